"""Make README.md's picture again: the page of a dump in which two query chunks did not receive a key/value chunk.

    python tools/wrong_dump.py build/wrong-dump
    cd build/wrong-dump
    cpjax judge-dump --query q.npy --key k.npy --value v.npy --out out.npy --scale 0.125 --causal --cp 4 --report report
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,1260 \\
        --screenshot=page.png report/index.html
    python -c 'from PIL import Image; Image.open("page.png").quantize(128).save("../../docs/wrong-dump.png")'

Then look at it: it should end below the two maps. Make it again when the words of a failed verdict or the page change.
"""

import sys
from pathlib import Path

import numpy as np
import torch

TOKENS, HEADS, DIM, CP = 512, 4, 64, 4
CHUNK = TOKENS // (2 * CP)
LOST, NOT_RECEIVED_BY = 1, (5, 6)
"""A key/value chunk, and the query chunks that do not receive it."""


def dump(folder: Path) -> None:
    """As a ring of 4 ranks in zigzag order would have dumped it: float16, `[tokens, heads, dim]`, causal, out wrong."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, HEADS, TOKENS, DIM).half()
    is_seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for chunk in NOT_RECEIVED_BY:
        is_seen[chunk * CHUNK : (chunk + 1) * CHUNK, LOST * CHUNK : (LOST + 1) * CHUNK] = False
    out = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in (query, key, value)), is_seen)[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {"q": query, "k": key, "v": value, "out": out}.items():
        np.save(folder / f"{name}.npy", array.transpose(0, 1).contiguous().numpy())


if __name__ == "__main__":
    dump(Path(sys.argv[1]))
