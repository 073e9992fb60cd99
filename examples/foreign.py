"""A backend that shares nothing with cpjax: cases in, results out, with struct and json only (docs/formats.md).

    python foreign.py CASES RESULTS

Slow on purpose: every number is unpacked by hand, so that the program can be written again in any language.
"""

import json
import math
import struct
import sys
from pathlib import Path

CODES = {"F16": "e", "F32": "f", "I32": "i"}


def read(path):
    """Metadata, and name → (shape, flat list of numbers) of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        code = CODES[entry["dtype"]]
        count = (stop - start) // struct.calcsize("<" + code)
        tensors[name] = (entry["shape"], struct.unpack(f"<{count}{code}", content[start:stop]))
    return metadata, tensors


def write(path, metadata, tensors):
    """Write name → (dtype, shape, flat list) under another name, then rename."""
    header, body = {"__metadata__": metadata}, b""
    for name, (dtype, shape, numbers) in tensors.items():
        data = struct.pack(f"<{len(numbers)}{CODES[dtype]}", *numbers)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(struct.pack("<Q", len(text)) + text + body)
    unfinished.rename(path)


def attend(said, tensors, b, t, n):
    """`out` (a list of V numbers) and `lse` of one query."""
    (_, tokens, heads, dim), query = tensors["query"]
    (_, keys, kv_heads, value_dim), value = tensors["value"]
    key, k = tensors["key"][1], n * kv_heads // heads
    position, segment = tensors["q_position"][1][b * tokens + t], tensors["q_segment"][1][b * tokens + t]
    row = query[((b * tokens + t) * heads + n) * dim :][:dim]
    scores = {}
    for s in range(keys):
        if segment == -1 or tensors["kv_segment"][1][b * keys + s] != segment:
            continue
        if said["is_causal"] and tensors["kv_position"][1][b * keys + s] > position:
            continue
        other = key[((b * keys + s) * kv_heads + k) * dim :][:dim]
        scores[s] = said["scale"] * sum(x * y for x, y in zip(row, other, strict=True))
    if not scores:
        return [0.0] * value_dim, -math.inf
    lse = max(scores.values())
    lse += math.log(sum(math.exp(score - lse) for score in scores.values()))
    out = [0.0] * value_dim
    for s, score in scores.items():
        weight, start = math.exp(score - lse), ((b * keys + s) * kv_heads + k) * value_dim
        out = [x + weight * y for x, y in zip(out, value[start : start + value_dim], strict=True)]
    return out, lse


def compute(path, folder):
    """One case to one result, or to a note that it is not supported."""
    metadata, tensors = read(path)
    said = json.loads(metadata["case"])
    about = {"format": "cpjax.result", "version": "1", "name": metadata["name"], "digest": metadata["digest"]}
    if said["layout"] != "zigzag" or "window" in said or "c_kv" in tensors:
        note = about | {"format": "cpjax.outcome", "backend": "foreign", "outcome": "unsupported"}
        note["reason"] = "a window" if "window" in said else "a latent" if "c_kv" in tensors else said["layout"]
        (folder / f"{path.stem}.json").write_text(json.dumps(note))
        return
    (batch, tokens, heads, _), cp, value_dim = tensors["query"][0], said["cp"], tensors["value"][0][3]
    chunk, results = tokens // (2 * cp), {}
    for rank in range(cp):
        held = [c * chunk + i for c in (rank, 2 * cp - 1 - rank) for i in range(chunk)]
        rows = [attend(said, tensors, b, t, n) for b in range(batch) for t in held for n in range(heads)]
        places = [[tensors[f"q_{what}"][1][b * tokens + t] for b in range(batch) for t in held]
                  for what in ("position", "segment")]  # fmt: skip
        shape = [batch, len(held), heads]
        results[f"out.{rank}"] = ("F16", [*shape, value_dim], [x for out, _ in rows for x in out])
        results[f"lse.{rank}"] = ("F32", shape, [lse for _, lse in rows])
        results[f"positions.{rank}"] = ("I32", shape[:2], places[0])
        results[f"segments.{rank}"] = ("I32", shape[:2], places[1])
    about |= {"backend": "foreign", "precision": "flash_fp16", "order": "ascending", "about": "{}"}
    write(folder / path.name, about, results)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    for case in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        compute(case, Path(sys.argv[2]))
