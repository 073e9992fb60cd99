"""Execute notebooks and compare what they print and draw with the outputs that are stored in them.

    python tools/fresh_notebooks.py notebooks/*.ipynb            # exit status 1 where a stored output is stale
    python tools/fresh_notebooks.py --write notebooks/*.ipynb    # and store the fresh outputs instead

Text must be equal. Pictures must have the same size and show the same: see `ALIKE`. Where that cannot hold, the cell
has a tag:

    varies       no two runs have the same numbers in it (durations, versions): they may differ, the words may not
    processor    it shows what the kernels of one kind of processor do: on another kind it must only have outputs

A notebook's metadata says on which kind of processor its outputs were made. Another kind rounds otherwise: there the
numbers of all cells may differ. Where numbers may differ, of pictures only the size is compared. With `--write`, a cell
whose outputs are alike keeps the stored ones, so that a change of one cell is a change of one cell in the repository.
"""

import argparse
import base64
import io
import platform
import re
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

VARIES, PROCESSOR = "varies", "processor"
"""The tags. PROCESSOR is also the name in a notebook's metadata."""

KINDS = "GenuineIntel", "AuthenticAMD", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile"
"""By which of these words describe a processor, libraries choose between their kernels."""

ALIKE = 32, 1e-4
"""By how many of 255 levels a pixel may differ, and which share of all pixels may differ by more.

Two processors round a few values differently, which moves a marker by a fraction of a pixel: the edges of what is drawn
get another shade. A line, a marker or a word that is missing changes more pixels than this.
"""

MEND = "if the fresh output is right: make fresh (it stores the fresh outputs), then look at the difference"

EMBEDDED = re.compile("data:image/png;base64,([A-Za-z0-9+/=]+)")
"""A picture inside an HTML output, such as those behind a slider. It is compared as every picture is."""

SECONDS = 600
"""The time limit of one cell."""


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="store what comes out; not if a cell raises")
    asked = parser.parse_args(arguments)
    stale = 0
    for path in asked.notebooks:
        start = time.monotonic()
        stored = nbformat.read(path, as_version=4)
        fresh = executed(stored, path.parent)
        found = list(differences(stored, fresh))
        verdict = f"{len(found)} stale outputs" if found else "fresh"
        print(f"{path}: {verdict}, executed in {time.monotonic() - start:.0f} s", flush=True)
        for cell, what in found:
            print(f"  {path.name}, cell {cell}: {what}", flush=True)
        is_broken = any("raised" in what for _, what in found)
        if asked.write and not is_broken:
            replace_stale(stored, fresh)
            stored.metadata[PROCESSOR] = processor()
            nbformat.write(stored, path)
        else:
            stale += len(found)
    if stale:
        print(MEND, file=sys.stderr)
    return int(stale > 0)


def executed(stored: Any, folder: Path) -> Any:
    """A copy of a notebook with fresh outputs, from a kernel of its own that starts in `folder`.

    A cell that raises ends the run; the error is its output.
    """
    fresh = nbformat.from_dict(stored)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(fresh, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except Exception as error:  # nbclient has several; what the cell raised is among its outputs
        if not any(output.output_type == "error" for cell in fresh.cells for output in cell.get("outputs", [])):
            raise error
    return fresh


def processor() -> str:
    """The architecture of this machine, and which of `KINDS` Linux says of its processor."""
    listed = Path("/proc/cpuinfo")
    words = set(listed.read_text().split()) if listed.exists() else set()
    return " ".join([platform.machine(), *(word for word in KINDS if word in words)])


def differences(stored: Any, fresh: Any) -> Iterator[tuple[int, str]]:
    """Index of a cell and what is stale in it. Both have the same sources. After an error nothing is compared."""
    is_same = stored.metadata.get(PROCESSOR, processor()) == processor()
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if new.cell_type != "code":
            continue
        yield from ((number, what) for what in differences_of(old, new, is_same))
        if any(output.output_type == "error" for output in new.outputs):
            return
        if old.execution_count != new.execution_count:
            yield number, f"stored as number {old.execution_count} of the run; it is number {new.execution_count}"


def differences_of(old: Any, new: Any, is_same_processor: bool) -> Iterator[str]:
    """What is stale in the outputs of one cell, on a processor such as that of the stored outputs or on another."""
    tags = old.metadata.get("tags", [])
    varies = VARIES in tags or not is_same_processor
    if PROCESSOR in tags and not is_same_processor:
        yield from (f"raised {content}" for kind, content in _parts(new.outputs) if kind == "error")
        if bool(old.outputs) != bool(new.outputs):
            yield "has outputs, and none is stored" if new.outputs else "has no outputs, and some are stored"
        return
    for was, now in zip_longest(_parts(old.outputs), _parts(new.outputs), fillvalue=None):
        if now is not None and now[0] == "error":
            yield f"raised {now[1]}"
        elif was is None and now is not None:
            yield f"{_shown(now)} is not stored"
        elif now is None and was is not None:
            yield f"{_shown(was)} is stored, and no longer made"
        elif was is not None and now is not None:
            yield from _between(was, now, varies)


def replace_stale(stored: Any, fresh: Any) -> None:
    """Give the cells of `stored` that are stale the outputs of `fresh`. Times of execution are no longer kept."""
    is_same = stored.metadata.get(PROCESSOR, processor()) == processor()
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        if new.cell_type != "code":
            continue
        old.metadata.pop("execution", None)
        old.execution_count = new.execution_count
        if any(True for _ in differences_of(old, new, is_same)):
            old.outputs = new.outputs


Part = tuple[str, Any]
"""A kind, such as `stdout`, `text/html` or `image/png`, and its content: text, or the bytes of a picture."""


def _parts(outputs: list[Any]) -> list[Part]:
    """Outputs as one list. Neighbouring pieces of a stream are one: where it is cut is a matter of time."""
    parts: list[Part] = []
    for output in outputs:
        if output.output_type == "stream":
            if parts and parts[-1][0] == output.name:
                parts[-1] = output.name, parts[-1][1] + output.text
            else:
                parts.append((output.name, output.text))
        elif output.output_type == "error":
            parts.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            for kind, content in sorted(output.data.items()):
                if kind == "text/html":
                    parts += [("image/png", base64.b64decode(one)) for one in EMBEDDED.findall(content)]
                    content = EMBEDDED.sub("(a picture)", content)
                is_picture = kind.startswith("image/") and kind != "image/svg+xml"
                parts.append((kind, base64.b64decode(content) if is_picture else content))
    return parts


def _between(was: Part, now: Part, varies: bool) -> Iterator[str]:
    """What differs between a stored part and the fresh part in its place."""
    if was[0] != now[0]:
        yield f"{_shown(was)} is stored; it is {_shown(now)} now"
    elif isinstance(now[1], bytes):
        if what := picture_difference(was[1], now[1], varies):
            yield f"{now[0]} differs: {what}"
    else:
        words = [_without_numbers(part[1]) if varies else part[1] for part in (was, now)]
        if words[0] != words[1]:
            yield f"{now[0]} differs: {_first_difference(str(was[1]), str(now[1]), varies)}"


def _without_numbers(text: Any) -> str:
    """Words, with a mark in place of each number. Wider numbers may have moved words to the next line."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", " # ", str(text)).split())


def _first_difference(was: str, now: str, varies: bool) -> str:
    for old, new in zip_longest(was.splitlines(), now.splitlines(), fillvalue="(no line)"):
        if old != new and not (varies and _without_numbers(old) == _without_numbers(new)):
            return f"stored {old[:160]!r}, fresh {new[:160]!r}"
    return "the ends of their lines"


def picture_difference(was: bytes, now: bytes, varies: bool = False) -> str | None:
    """How two pictures differ, each frame of them; None where they are alike."""
    before, after = _frames(was), _frames(now)
    if before.shape != after.shape:
        return f"stored (frames, height, width) {before.shape[:3]}, fresh {after.shape[:3]}"
    if varies:
        return None
    levels, share = ALIKE
    off = (np.abs(before - after) > levels).any(axis=-1)
    if off.mean() <= share:
        return None
    _, rows, columns = np.nonzero(off)
    place = f"rows {rows.min()} to {rows.max()}, columns {columns.min()} to {columns.max()}"
    return f"{off.mean():.2%} of its pixels, all within {place} of {off.shape[1]} × {off.shape[2]}"


def _frames(picture: bytes) -> np.ndarray:
    """Levels [frames, height, width, 4] of a picture, which may be animated."""
    with Image.open(io.BytesIO(picture)) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGBA"), np.int16))
    return np.stack(frames)


def _shown(part: Part) -> str:
    kind, content = part
    if isinstance(content, bytes):
        return f"a picture ({kind})"
    line = (str(content).strip().splitlines() or [""])[0]
    return f"{kind} {line[:80]!r}"


if __name__ == "__main__":
    sys.exit(main())
