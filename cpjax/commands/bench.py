"""`cpjax bench`."""

import json
from typing import Annotated

import typer

from cpjax.commands.common import DONE, Json, console, errors, progress, whole_numbers

app = typer.Typer()

BENCH_HELP = """Time attention on this machine beside PyTorch's fused kernel, the matrix products alone, dense JAX, and
ring-attention-pytorch.

Each contender has a process of its own and the same number of cores. In every round each computes once, in an order
that turns round; medians are shown, of seconds and of CPU time, which repeats better where other programs run. gemm are
the same matrix products alone, by torch.matmul for 512 queries at a time: a mark, not a limit, for their scores do not
stay in a cache as those of a fused kernel do. "first s" is the first run, which compiles.

Example: cpjax bench --tokens 8192 --heads 4 --head-dim 64 --json

A latent, absorbed: cpjax bench --heads 16 --kv-heads 1 --head-dim 576 --value-dim 512 --tokens 2048
"""


@app.command(help=BENCH_HELP, short_help="time attention beside PyTorch and JAX", epilog=DONE)
def bench(
    tokens: Annotated[str, typer.Option(metavar="N,…", help="lengths of the sequence")] = "8192",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="query heads")] = 4,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="key/value heads; as --heads if not said")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="numbers a head, of queries and keys")] = 64,
    value_dim: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="of values; as --head-dim if not said")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="float32,float16", help="dtypes of the arrays")] = "float32,float16",
    backward: Annotated[bool, typer.Option("--backward", help="forward and backward pass together")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="one new token's query over all keys")] = False,
    cp: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="cores: devices of ours, threads of PyTorch")] = 2,
    contenders: Annotated[
        str, typer.Option(metavar="NAME,…", help="who takes part")
    ] = "cpjax,torch_sdpa,gemm,jax_dense",
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="rounds that count")] = 5,
    as_json: Json = False,
) -> None:
    """See BENCH_HELP."""
    from cpjax.bench.contenders import CONTENDERS
    from cpjax.bench.rounds import bench as run
    from cpjax.bench.setting import Setting
    from cpjax.bench.table import table
    from cpjax.errors import InputError

    with errors():
        names = contenders.split(",")
        for name in names:
            if name not in CONTENDERS:
                raise InputError(f"--contenders has {name!r:.60}; known are {', '.join(CONTENDERS)}")
        if backward and decode:
            raise InputError("--backward and --decode are given; a decode step has no backward pass, leave one out")
        shape = heads, kv_heads or heads, head_dim, value_dim or head_dim
        direction = "both" if backward else "decode" if decode else "forward"
        masks = (True,) if decode else (False, True)  # the last token sees all keys
        lengths = whole_numbers(tokens, "--tokens") or ()
        grid = [(length, one, causal) for length in lengths for one in dtype.split(",") for causal in masks]
        settings = [Setting(length, *shape, one, causal, direction, cp) for length, one, causal in grid]
        with progress() as advance:
            rows = run(settings, names, repeats, advance)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
        return
    console().print(table(rows))
