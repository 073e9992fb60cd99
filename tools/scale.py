"""The figures of docs/scale.md: programs compiled one after the other, a row each, and the pictures of two steps.

    python tools/scale.py build/inspect                  all of them, as `make inspect` does
    python tools/scale.py build/inspect --only 8x8       those whose name has 8x8 in it

What has been compiled is kept as JSON in the folder, and not compiled again.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from cpjax.inspect.topology import prepare, topology


class Case(NamedTuple):
    """One row: 16 heads of 192/128 in bfloat16 on each chip, causal, zigzag, ring."""

    program: str
    topology: str
    tokens: int
    given_order: bool = False
    draw: bool = False
    attend: str = "tiles"

    @property
    def name(self) -> str:
        """As a file is called."""
        order = "-given-order" if self.given_order else ""
        program = self.program if self.attend == "tiles" else self.attend
        return f"{program}-{self.topology.replace(':', '-')}-{self.tokens}{order}"


K = 1024
CASES = (
    Case("forward", "v5e:2x2", 8 * K),
    Case("forward", "v5e:4x4", 128 * K, draw=True),
    Case("forward", "v5e:8x8", 128 * K),
    Case("forward", "v5e:8x8", 128 * K, given_order=True),
    Case("forward", "v5e:8x8", 1024 * K),
    Case("forward", "v5e:16x16", 1024 * K),
    Case("forward", "v5p:4x4x4", 128 * K, draw=True),
    Case("backward", "v5e:4x4", 128 * K),
    Case("latent", "v5e:4x4", 128 * K),
    Case("forward", "v6e:8x8", 128 * K),
    Case("forward", "tpu7x:2x2x1", 128 * K),
    *(
        Case("forward", name, 128 * K, attend="splash")
        for name in ("v5e:4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x2x1")
    ),
)

HEAD = (
    *("program", "topology", "tokens", "cp", "compile s", "HLO MB", "MiB per chip: in / out / temp / peak", "cycles"),
    "ring's transfers: asynchronous, around attention",
    *("of the large ones, least cycles enclosed / cycles on a link", "other collectives"),
)


def row(said: dict, given_order: bool) -> str:
    """A row of the table, from what `cpjax inspect --json` prints."""
    memory = [round(said["memory_bytes"][part] / 2**20) for part in ("arguments", "results", "temporaries", "peak")]
    ring = [x for x in said["transfers"] if not x["sender"].startswith("moving")]
    runs, late, hidden = (
        sum(x["runs"] for x in ring if test(x))
        for test in (lambda _: True, lambda x: x["asynchronous"], lambda x: x["encloses_attention"])
    )
    large = [x for x in ring if 2 * x["stored_bytes"] >= max(y["stored_bytes"] for y in ring)]
    enclosed = min(x["cycles_enclosed"] for x in large)
    link = max((x["link_cycles"] or 0) for x in large)
    foreign = {name: n for name, n in said["collectives"].items() if name != "collective-permute"}
    cells = (
        said["program"] + (", splash" if said.get("attend") == "splash" else ""),
        said["topology"] + (", as numbered" if given_order else ""),
        f"{said['tokens'] // K}K",
        said["cp"],
        f"{said['compile_seconds']:.0f}",
        f"{said['text_bytes'] / 1e6:.2f}",
        " / ".join(map(str, memory)),
        f"{said['cycles'] / 1e6:,.0f} M",
        f"{runs}: {late}, {hidden}",
        f"{enclosed / 1e6:.2f} M / " + (f"{link / 1e6:.2f} M" if link else "?"),
        ", ".join(f"{n} {name}" for name, n in foreign.items()) or "none",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="TEXT")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    prepare()
    from cpjax.inspect.draw import draw
    from cpjax.inspect.inspection import inspect
    from cpjax.inspect.programs import Shape

    print(f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|", sep="\n")
    for case in CASES:
        kept, picture = (arguments.folder / f"{case.name}.{ending}" for ending in ("json", "svg"))
        if arguments.only not in case.name:
            continue
        if not kept.exists():
            shape = Shape(case.tokens, attend=case.attend, in_partition_order=case.program == "latent")
            seen = inspect(case.program, topology(case.topology, case.given_order), shape)
            if case.draw:
                picture.unlink(missing_ok=True)
                draw(seen, picture)
            kept.write_text(json.dumps(seen.as_json(), indent=1))
        print(row(json.loads(kept.read_text()), case.given_order), flush=True)


if __name__ == "__main__":
    main()
