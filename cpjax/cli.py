"""The command `cpjax`. Errors of users exit 2 with one line, a failed verdict exits 1, success 0."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from cpjax.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="The executable specification of context-parallel attention, and the judge of its backends.",
)


def _mindie() -> typer.Typer:
    from cpjax.mindie.commands import app as mindie

    return mindie


app.add_typer(_mindie(), name="mindie")

CROSSCHECK_HELP = """Compute attention of a MindIE deployment three ways, and judge the outcome.

The specification (JAX ring attention on simulated devices) and the NPU backend (one process per rank) are each held
against dense attention in float64, each in the precision that it really computes in.

Example: cpjax crosscheck --config examples/deepseek-r1-cp2.json --tokens 512 --keep out
"""

JUDGE_HELP = """Judge results: is each what correct arithmetic in its precision gives?

CASES is a folder of cases (or one file), RESULTS the folder with the results, or with one subfolder a backend.

Example: cpjax judge out/cases out/results/npu
"""

DUMP_HELP = """Judge tensors that any tool dumped: .npy, .npz, .safetensors, torch .pt; a folder holds one file a rank.

FILE::NAME chooses one array of several. Give --query and --key twice for MLA's nope and rope parts; for the latent form
the absorbed query, and the latent as key. Layout, precision and order of merging are found out by trying if not said.

Example: cpjax judge-dump --query q.npy --key k.npy --value v.npy --out o.npy --scale 0.125 --causal
"""

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command(help=CROSSCHECK_HELP)
def crosscheck(
    config: Annotated[
        Path | None, typer.Option(help="a MindIE config.json; by default the vendor's example, DeepSeek-R1 on 16 NPUs")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="length of the prompt; by default the smaller of maxInputTokenLen and 2048")
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="HEADS,NOPE,ROPE,VALUE of a model that is not known by name")
    ] = None,
    shares: Annotated[int, typer.Option(help="how many of the tensor-parallel shares of the heads are computed")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the inputs, which are normally distributed")] = 0,
    keep: Annotated[Path | None, typer.Option(help="keep the case and the results in this folder")] = None,
    as_json: Json = False,
) -> None:
    """See CROSSCHECK_HELP."""
    from cpjax.crosscheck.backends import run_npu, run_spec
    from cpjax.crosscheck.case import write_case
    from cpjax.crosscheck.session import judge_folder
    from cpjax.mindie.crosscheck import cases_of

    with _errors():
        cases, remarks = cases_of(config, tokens=tokens, geometry=geometry, seed=seed, shares=shares)
        for remark in remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        with TemporaryDirectory(prefix="cpjax-") as temporary:
            folder = Path(temporary) if keep is None else keep
            cases = [write_case(folder / "cases", case) for case in cases]
            with _progress() as advance:
                for done, case in enumerate(cases):
                    advance("specification", done, len(cases))
                    run_spec(case, folder / "results" / "spec")
                advance("specification", len(cases), len(cases))
            run_npu(folder / "cases", folder / "results" / "npu")
            with _progress() as advance:
                judged = list(judge_folder(cases, folder / "results", advance))
        _show(judged, as_json)


@app.command(help=JUDGE_HELP)
def judge(
    cases: Annotated[Path, typer.Argument(metavar="CASES", help="a folder of case files, or one")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="the folder with the results")],
    as_json: Json = False,
) -> None:
    """See JUDGE_HELP."""
    from cpjax.crosscheck.session import judge_folder, read_cases

    with _errors():
        found = read_cases(cases)
        with _progress() as advance:
            judged = list(judge_folder(found, results, advance))
        _show(judged, as_json)


BENCH_HELP = """Time the forward pass beside PyTorch's fused kernel and dense JAX: interleaved, medians.

Example: cpjax bench --tokens 8192 --heads 4 --head-dim 64 --json
"""


@app.command(help=BENCH_HELP)
def bench(
    tokens: Annotated[int, typer.Option(min=1)] = 8192,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    cp: Annotated[int, typer.Option(min=1, max=64, help="devices, simulated on a CPU: one for each core")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each contender that count")] = 5,
    as_json: Json = False,
) -> None:
    """See BENCH_HELP."""
    import jax

    from cpjax import bench as bench_module

    with _errors():
        jax.config.update("jax_num_cpu_devices", cp)
        rows = bench_module.bench(tokens, heads, head_dim, cp, repeats)
        print(json.dumps([row._asdict() for row in rows], indent=2) if as_json else bench_module.table(rows))


@app.command("judge-dump", help=DUMP_HELP)
def judge_dump(
    query: Annotated[list[Path], typer.Option(help="file with the queries")],
    key: Annotated[list[Path], typer.Option(help="file with the keys")],
    value: Annotated[Path, typer.Option(help="file with the values")],
    out: Annotated[Path, typer.Option(help="file with the result that is judged")],
    scale: Annotated[float, typer.Option(help="multiplies q·k")],
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="whether a causal mask applies")],
    lse: Annotated[Path | None, typer.Option(help="file with lse, natural logarithm")] = None,
    layout_of: Annotated[str | None, typer.Option(help="bsnd, bnsd or tnd")] = None,
    positions: Annotated[Path | None, typer.Option(help="file with the global position of each query")] = None,
    lengths: Annotated[str | None, typer.Option(help="LENGTH,… of the requests of a packed batch")] = None,
    cp: Annotated[int, typer.Option(min=1, max=2**16, help="ranks; keys were cut into 2·cp chunks")] = 1,
    precision: Annotated[str | None, typer.Option(help="a profile, see docs/precision.md")] = None,
    order: Annotated[str | None, typer.Option(help="of merging: ring, gather, ascending, unknown")] = None,
    as_json: Json = False,
) -> None:
    """See DUMP_HELP."""
    from cpjax.crosscheck import dumped
    from cpjax.crosscheck.session import Judged

    with _errors():
        try:
            several = None if lengths is None else [int(n) for n in lengths.split(",")]
        except ValueError:
            raise InputError(f"--lengths {lengths!r} must be whole numbers with commas, as 512,300") from None
        said = dumped.judge_dump(
            query, key, value, out, lse, scale=scale, is_causal=causal, layout=layout_of, positions=positions,
            lengths=several, cp=cp, precision=precision, order=order,
        )  # fmt: skip
        for remark in said.remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        judged = Judged(out.name, "dump", said.verdict.precision, said.verdict.order, None, said.verdict)
        _show([judged], as_json)


def main() -> None:
    """The entry point of the console script."""
    app()


@contextmanager
def _errors() -> Iterator[None]:
    from cpjax.crosscheck.backends import BackendError

    try:
        yield
    except (InputError, BackendError) as error:
        print(f"cpjax: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        print("cpjax: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _progress() -> Iterator:
    """A bar on stderr; `advance(what, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def _show(judged: list, as_json: bool) -> None:
    """Print everything and exit 1 unless everything passed."""
    from rich.console import Console

    from cpjax.crosscheck.session import sentence, table_of

    passed = bool(judged) and all(one.passed for one in judged)
    if as_json:
        report = {"passed": passed, "summary": sentence(judged), "results": [one.as_json() for one in judged]}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table_of(judged))
        for one in judged:
            for reason in one.reasons if not one.passed else []:
                console.print(f"{one.case}, {one.backend}: {reason}", highlight=False, markup=False)
            for cause in one.verdict.diagnosis if one.verdict is not None else []:
                console.print(f"{one.case}, {one.backend}: diagnosis: {cause}", highlight=False, markup=False)
        console.print(sentence(judged), highlight=False, markup=False)
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    main()
