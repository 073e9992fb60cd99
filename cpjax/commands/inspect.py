"""`cpjax inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cpjax.commands.common import DONE, Json, errors, progress

app = typer.Typer()

HELP = """Compile attention for a TPU topology with the real TPU compiler, and read its schedule; no TPU is needed.

Printed are each transfer with its bytes, what is computed between its start and its end, loops with their trips,
estimated cycles, and memory per chip. docs/scale.md says how to read it.

The program is the public function's (forward), with --backward its value and derivatives, with --latent MLA, whose
latent travels. It needs libtpu: pip install 'cpjax[tpu]'.

Example: cpjax inspect --topology v5e:4x4 --tokens 131072 --draw step.svg
"""


@app.command(help=HELP, short_help="compile for many TPUs without one; transfers, memory", epilog=DONE)
def inspect(
    topology: Annotated[str, typer.Option(metavar="NAME", help="v5e:8x8, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1, …")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="of the whole sequence; the ring takes every device")],
    backward: Annotated[bool, typer.Option("--backward", help="the value and its derivatives")] = False,
    latent: Annotated[bool, typer.Option("--latent", help="MLA: keys and values are made where they are used")] = False,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="query heads")] = 16,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="key/value heads; as many as heads if not said")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="of queries and keys")] = 192,
    value_dim: Annotated[int, typer.Option(min=1, metavar="N", help="of values")] = 128,
    latent_dim: Annotated[int, typer.Option(min=1, metavar="N", help="with --latent: numbers of a latent")] = 512,
    rope_dim: Annotated[
        int, typer.Option(min=1, metavar="N", help="with --latent: of head_dim, what heads share")
    ] = 64,
    dtype: Annotated[
        str, typer.Option(metavar="bfloat16|float16|float32", help="of the arrays; the precision follows")
    ] = "bfloat16",
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="whether a causal mask applies")] = True,
    partition: Annotated[
        str, typer.Option(metavar="zigzag|contiguous|striped", help="who holds which tokens")
    ] = "zigzag",
    exchange: Annotated[
        str,
        typer.Option(metavar="ring|ring_both_ways|gather|pass_query|all_to_all", help="how keys meet queries"),
    ] = "ring",
    attend: Annotated[
        str, typer.Option(metavar="tiles|splash", help="what computes a block; cycles of splash are not estimated")
    ] = "tiles",
    in_partition_order: Annotated[
        bool, typer.Option("--in-partition-order", help="arrays are the ranks' shards already: none is moved before")
    ] = False,
    given_order: Annotated[
        bool, typer.Option("--given-order", help="leave devices as numbered, instead of as a cycle on the torus")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE", help="draw one step: .svg or .png, not there yet")
    ] = None,
    as_json: Json = False,
) -> None:
    """See HELP."""
    from cpjax.inspect import topology as of

    with errors():
        of.prepare()  # before JAX is imported
        from rich.console import Console

        from cpjax.crosscheck.files.pictures import check_picture
        from cpjax.errors import InputError
        from cpjax.inspect.draw import draw
        from cpjax.inspect.inspection import inspect as inspected
        from cpjax.inspect.programs import Shape, check_program
        from cpjax.inspect.report import report

        if backward and latent:
            raise InputError("--backward and --latent are two programs; choose one")
        if picture is not None:
            check_picture(picture)
        shape = Shape(
            tokens,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            dtype,
            causal,
            partition,
            exchange,
            attend,
            in_partition_order or latent,
            latent_dim,
            rope_dim,
        )
        program = "backward" if backward else "latent" if latent else "forward"
        check_program(program, shape)
        with progress() as advance:
            seen = inspected(program, of.topology(topology, given_order), shape, advance)
        if picture is not None:
            draw(seen, picture)
        if as_json:
            print(json.dumps(seen.as_json(), indent=2, allow_nan=False))
        else:
            Console().print(report(seen), highlight=False)
            if picture is not None:
                print(f"drawn: {picture}")
