"""The command `cpjax`. Errors of users exit 2 with one line, a failed verdict exits 1, success 0, Ctrl-C 130."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cpjax.commands.bench import app as bench
from cpjax.commands.common import DONE, Json, errors, progress, usage_errors, whole_numbers
from cpjax.commands.deepseek import app as deepseek
from cpjax.commands.fingerprint import app as fingerprint
from cpjax.commands.fingerprint import checked_head_dims, checked_ranks
from cpjax.commands.inspect import app as inspect
from cpjax.commands.plan import app as plan
from cpjax.commands.verdicts import JUDGED, Report, free, report_to, show
from cpjax.errors import InputError

SHOWN = (
    *("judge-dump", "judge", "cases", "fingerprint", "examples", "crosscheck", "checkpoint", "generate", "backends"),
    *("bench", "inspect", "plan", "mindie"),
)
"""The commands in the order of the help: what most people come for stands first."""


class _Shown(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=SHOWN.index)

    def make_context(self, *arguments: Any, **keywords: Any) -> Any:
        with usage_errors():
            return super().make_context(*arguments, **keywords)

    def invoke(self, ctx: Any) -> Any:
        with usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Shown,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Judge attention kernels, and compute context-parallel attention as its specification does.",
    epilog=f"{JUDGED} Each command has a help of its own: cpjax judge-dump --help.",
)


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        print(f"cpjax {version('cpjax')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself; the help is said above."""


def _mindie() -> typer.Typer:
    from cpjax.mindie.commands import app as mindie

    return mindie


app.add_typer(bench)
app.add_typer(deepseek)
app.add_typer(fingerprint)
app.add_typer(inspect)
app.add_typer(plan)
app.add_typer(_mindie(), name="mindie", short_help="check and explain a MindIE config.json")

CROSSCHECK_HELP = """Compute attention of a MindIE deployment three ways, and judge the outcome.

The specification (JAX ring attention on simulated devices) and the NPU backend (one process per rank) are each held
against dense attention in float64, each in the precision that it really computes in.

Other backends (cpjax backends) take part with --backend, other cases than a deployment's with --cases.

Example: cpjax crosscheck --config examples/deepseek-r1-cp2.json --tokens 512 --keep out
"""

JUDGE_HELP = """Judge results: is each what correct arithmetic in its precision gives?

CASES is a folder of cases (or one file), RESULTS the folder with the results, or with one subfolder a backend.

--explain shows the error budget of one row: each term of its σ and of its bound, by name (docs/verdict.md).

Cases of a decoder layer (cpjax cases --preset layer) are judged stage by stage: one line a stage. A wrong stage is
named with its kind, its place, and the known fault that it equals, if there is one.

Example: cpjax judge out/cases out/results/npu
"""

DUMP_HELP = """Judge tensors that any tool dumped: .npy, .npz, .safetensors, torch .pt; or folders of one file per rank.

One FILE may hold all tensors, under names like q, k, v, o, lse (else --names). FILE::NAME chooses one array of several.
Give --query and --key twice for MLA's nope and rope parts; for the latent form the absorbed query, the latent as key.

Layout, precision, order of merging, axes and base of lse, and how ranks were cut are found by trying if not said, and
printed. What no trial can tell is asked for (exit status 2). Sink, softcap, bias and window: none if not said.

Examples:

\b
cpjax judge-dump --query q.npy --key k.npy --value v.npy --out o.npy \\
    --scale 0.125 --causal

\b
cpjax judge-dump dump.safetensors --names query=attn.q,out=attn.y \\
    --scale 0.125 --causal --window 4096 --sink sinks.npy

\b
cpjax judge-dump dump.pt --scale 0.125 --causal --layout-of tnd \\
    --cu-seqlens-q cu_q.pt --cu-seqlens-k cu_k.pt --align bottom-right \\
    --lse-layout nt

\b
cpjax judge-dump --query q.pt --key k_cache.pt --value v_cache.pt \\
    --out o.pt --block-table table.pt --seq-lens lens.pt \\
    --scale 0.125 --no-causal --kv-scale 0.05

\b
cpjax judge-dump --query q --key k --value v --out o --scale 0.125 \\
    --causal --partition zigzag          (folders of ranks)

\b
cpjax judge-dump --query q.pt --key k.pt --value v.pt --out o.pt --lse l.pt \\
    --dout do.pt --dq dq.pt --dk dk.pt --dv dv.pt --scale 0.125 --causal
"""


@app.command(help=CROSSCHECK_HELP, short_help="compute a MindIE deployment three ways, judge them", epilog=JUDGED)
def crosscheck(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="a MindIE config.json; by default the vendor's example, DeepSeek-R1 on 16 NPUs"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="length of the prompt; by default the smaller of maxInputTokenLen and 2048"),
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(metavar="HEADS,NOPE,ROPE,VALUE", help="of a model that is not known by name")
    ] = None,
    shares: Annotated[
        int, typer.Option(metavar="N", help="how many of the tensor-parallel shares of the heads are computed")
    ] = 1,
    decode: Annotated[
        bool, typer.Option("--decode", help="also a decode step, over the KV cache that cp·sp ranks share")
    ] = False,
    latent: Annotated[
        bool,
        typer.Option("--latent", help="MLA's latent travels, and each rank makes keys and values of it"),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the inputs, which are normally distributed")] = 0,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="keep the case and the results in this folder")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="spec, npu, sdpa, or another that cpjax backends lists; can be given several "
            "times; by default spec and npu",
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option("--cases", metavar="DIR", help="compute the cases of this folder instead of a deployment's"),
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """See CROSSCHECK_HELP."""
    from cpjax.crosscheck.backends import check_names
    from cpjax.crosscheck.backends.launch import launch
    from cpjax.crosscheck.files.case import write_case
    from cpjax.crosscheck.files.folders import read_cases
    from cpjax.crosscheck.run.compare import compare_folder
    from cpjax.crosscheck.run.session import judge_folder
    from cpjax.mindie.crosscheck import cases_of

    names = list(dict.fromkeys(backend or ["spec", "npu"]))
    with errors():
        check_names(names)
        free(report)
        if given is None:
            cases, remarks = cases_of(
                config, tokens=tokens, geometry=geometry, seed=seed, shares=shares, decode=decode, latent=latent
            )
        elif (config, tokens, geometry, seed, shares, decode, latent) == (None, None, None, 0, 1, False, False):
            cases, remarks = read_cases(given), []
        else:
            raise InputError(
                "--cases says all; leave out --config, --tokens, --geometry, --shares, --decode, --latent and --seed"
            )
        for remark in remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        with TemporaryDirectory(prefix="cpjax-") as temporary:
            folder = Path(temporary) if keep is None else keep
            if given is None:
                cases = [write_case(folder / "cases", case) for case in cases]
            for name in names:
                launch(name, given or folder / "cases", folder / "results" / name, cases)
            with progress() as advance:
                judged = list(judge_folder(cases, folder / "results", advance, draw=report is not None))
                compared = list(compare_folder(cases, folder / "results", judged, advance))
        report_to(report, judged, "cpjax crosscheck")
        show(judged, as_json, compared)


@app.command(help=JUDGE_HELP, short_help="judge a folder of results of cases", epilog=JUDGED)
def judge(
    cases: Annotated[Path, typer.Argument(metavar="CASES", help="a folder of case files, or one")],
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="the folder with the results")],
    explain: Annotated[
        list[str] | None,
        typer.Option(help="show the error budget of a row (several times)", metavar="CASE,BATCH,POSITION,HEAD"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, metavar="N", help="processes that judge (default: all cores)")
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """See JUDGE_HELP."""
    from cpjax.commands.layers import judge_layer_folder
    from cpjax.crosscheck.files.folders import read_cases
    from cpjax.crosscheck.layer.session import are_layers
    from cpjax.crosscheck.run.explain import budgets_of, checked_rows
    from cpjax.crosscheck.run.session import judge_folder

    with errors():
        free(report)
        if are_layers(cases):
            if explain or report is not None:
                raise InputError("--explain and --report are of attention; leave them out, these cases are layers")
            judge_layer_folder(cases, results, as_json)
        found = read_cases(cases)
        rows = checked_rows(explain or [], found)
        with progress() as advance:
            draw = report is not None or bool(rows)
            judged = list(judge_folder(found, results, advance, draw=draw, workers=workers))
        budgets = list(budgets_of(judged, rows))
        report_to(report, judged, "cpjax judge")
        show(judged, as_json, budgets=budgets, asked=True)


CASES_HELP = """Write a set of cases into a new folder, with checksums, for any kernel to compute.

conformance: small cases of every kind, the same bytes everywhere; those come first whose outputs tell what is wrong.
Compute them (docs/formats.md), then: cpjax judge DIR RESULTS

fingerprint: the probes of cpjax fingerprint, for a kernel that is called elsewhere. Then: cpjax fingerprint DIR RESULTS

layer: a whole decoder layer of DeepSeek, dense and with experts, float, W8A8 and W4A8. Then: cpjax judge DIR RESULTS

Example: cpjax cases --preset conformance cases
"""


@app.command(help=CASES_HELP, short_help="write the conformance set: cases for a new kernel", epilog=DONE)
def cases(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet")],
    preset: Annotated[str, typer.Option(metavar="conformance|fingerprint|layer", help="which set")] = "conformance",
    head_dims: Annotated[
        str, typer.Option(metavar="QK,V", help="of the fingerprint's probes, for a kernel that takes no others")
    ] = "64,64",
    cp: Annotated[
        int | None, typer.Option(metavar="1-4", help="ranks of the fingerprint's probes over ranks; 1: without them")
    ] = None,
    as_json: Json = False,
) -> None:
    """See CASES_HELP."""
    from cpjax.crosscheck.conformance.cases import VERSION, write_conformance
    from cpjax.crosscheck.layer.case import SET_VERSION as LAYERS
    from cpjax.fingerprint.folder import VERSION as PROBES
    from cpjax.fingerprint.folder import write_probes

    with errors():
        dims, ranks = checked_head_dims(head_dims), checked_ranks(cp)
        sets = {
            "conformance": (write_conformance, VERSION, "cpjax judge"),
            "fingerprint": (lambda new: write_probes(new, dims, ranks), PROBES, "cpjax fingerprint"),
            "layer": (_write_layers, LAYERS, "cpjax judge"),
        }
        if preset not in sets:
            raise InputError(f"--preset {preset!r} is unknown; known are {', '.join(sets)}")
        if preset != "fingerprint" and head_dims != "64,64":
            raise InputError("--head-dims is of --preset fingerprint")
        if preset != "fingerprint" and cp is not None:
            raise InputError("--cp is of --preset fingerprint")
        write, version, command = sets[preset]
        written = write(folder)
    rows = [{"case": case.name, "digest": case.digest, "says": _says(case.about)} for case in written]
    if as_json:
        print(json.dumps({"preset": preset, "version": version, "cases": rows}, indent=2))
    else:
        for row in rows:
            print(": ".join(filter(None, (row["case"], row["says"]))))
        print(f"{len(rows)} cases, version {version}, in {folder}. Next: {command} {folder} RESULTS")


def _write_layers(folder: Path) -> list:
    """Their weights are made with JAX, which the other sets do without."""
    from cpjax.deepseek.layer_cases import write_layer_cases

    return write_layer_cases(folder)


def _says(about: Any) -> str:
    """What a case says of itself; one of a layer has nothing else to say."""
    return about if isinstance(about, str) else about.get("says", "")


EXAMPLES_HELP = """Write the example configs and the documentation into a new folder.

Helps and messages name files under examples/ and docs/: they are there when you stand in this folder.

Example: cpjax examples cpjax-files
"""


@app.command(help=EXAMPLES_HELP, short_help="write the example configs and the docs", epilog=DONE)
def examples(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet")]) -> None:
    """See EXAMPLES_HELP."""
    from cpjax.shared import write_shared

    with errors():
        written = write_shared(folder)
    for path in written:
        print(path)


BACKENDS_HELP = """List the installed backends: who can compute a case (docs/backends.md tells how to add one).

Example: cpjax backends --json
"""


@app.command(help=BACKENDS_HELP, short_help="list who can compute a case", epilog=DONE)
def backends(as_json: Json = False) -> None:
    """See BACKENDS_HELP."""
    from cpjax.crosscheck.backends import about, installed

    with errors():
        rows = [about(entry) for entry in installed().values()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['name']:<12} {row['package']} {row['version']}  {row['value']}")


PROFILE_NAMES = (
    "float64, float32, flash_fp16, flash_bf16, ring_mla_fp16, decode_fp16_lse, fia_fp16, softmax_fp16, eager_fp16, "
    "rounded_sum_fp16, scaled_query_fp16, fia_bf16, softmax_bf16, eager_bf16, rounded_sum_bf16, scaled_query_bf16"
)
"""Written out, so that a help loads no NumPy; tests/run/test_command.py holds it against the profiles."""


@app.command("judge-dump", help=DUMP_HELP, short_help="judge tensors that any tool dumped", epilog=JUDGED)
def judge_dump(
    scale: Annotated[float, typer.Option(metavar="X", help="multiplies q·k")],
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="whether a causal mask applies")],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="several tensors: a .safetensors, .npz or .pt, or a folder with a file for each"
        ),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="query=NAME,…", help="of the tensors in FILE, if they have other names")
    ] = None,
    query: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="the queries")] = None,
    key: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="the keys")] = None,
    value: Annotated[Path | None, typer.Option(metavar="FILE", help="the values")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the result that is judged")] = None,
    lse: Annotated[Path | None, typer.Option(metavar="FILE", help="the logarithm of the softmax sum")] = None,
    dout: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the gradient of out, to judge a backward pass too")
    ] = None,
    dq: Annotated[Path | None, typer.Option(metavar="FILE", help="the gradient of the queries")] = None,
    dk: Annotated[Path | None, typer.Option(metavar="FILE", help="the gradient of the keys")] = None,
    dv: Annotated[Path | None, typer.Option(metavar="FILE", help="the gradient of the values")] = None,
    ds: Annotated[
        str | None,
        typer.Option(metavar="plain|of_rounded_p|scaled", help="what the backward pass rounds; found out if not said"),
    ] = None,
    rounded_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="queries after which dk and dv are rounded, if kept in half precision"),
    ] = None,
    over_ranks: Annotated[
        str | None,
        typer.Option(
            metavar="float32|out",
            help="in what a ring adds up gradients of chunks that are rounded; found out if not said",
        ),
    ] = None,
    lse_base: Annotated[str | None, typer.Option(metavar="e|2", help="base of the logarithm")] = None,
    lse_layout: Annotated[
        str | None,
        typer.Option(
            metavar="bsn|bns|tn|nt", help="axes; bsn1, … with an axis of 1 behind; bsn8, … of 8 equal numbers"
        ),
    ] = None,
    layout_of: Annotated[
        str | None,
        typer.Option(metavar="bsnd|bnsd|tnd|sbnd", help="batch, sequence (of all requests: tokens), heads n, head dim"),
    ] = None,
    positions: Annotated[Path | None, typer.Option(metavar="FILE", help="the global position of each query")] = None,
    align: Annotated[
        str | None,
        typer.Option(
            metavar="bottom-right|top-left",
            help="where the mask starts if queries and keys differ in number; bottom-right: the last query sees all",
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(metavar="LENGTH,…", help="of the requests of a packed batch")] = None,
    segments: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the request of each token, -1 for a pad")
    ] = None,
    cu_seqlens_q: Annotated[
        Path | None, typer.Option(metavar="FILE", help="0 and the end of each request's queries")
    ] = None,
    cu_seqlens_k: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the same of the keys, if there are others")
    ] = None,
    cu_seqlens_padded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="the same with pads: where requests really begin; cu-seqlens are their lengths"
        ),
    ] = None,
    block_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="[requests, blocks]; key and value are [blocks, block_size, heads, dim]"),
    ] = None,
    seq_lens: Annotated[Path | None, typer.Option(metavar="FILE", help="the cached tokens of each request")] = None,
    window: Annotated[int | None, typer.Option(metavar="N", help="keys that a query sees, its own included")] = None,
    sink: Annotated[
        Path | None, typer.Option(metavar="FILE", help="[heads]: a logit more in each head's softmax")
    ] = None,
    softcap: Annotated[float | None, typer.Option(metavar="X", help="scores become X·tanh(score / X)")] = None,
    alibi: Annotated[Path | None, typer.Option(metavar="FILE", help="slopes [heads] or [batch, heads]")] = None,
    bias: Annotated[
        Path | None, typer.Option(metavar="FILE", help="added to scores, as [batch, heads, queries, keys]")
    ] = None,
    kv_scale: Annotated[
        float | None, typer.Option(metavar="X", help="of an FP8 cache: multiplies keys and values")
    ] = None,
    key_scale: Annotated[float | None, typer.Option(metavar="X", help="of the keys alone")] = None,
    value_scale: Annotated[float | None, typer.Option(metavar="X", help="of the values alone")] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="who holds which tokens: contiguous, zigzag, striped, packed, blocks, interleaved; blocks:64 and "
            "interleaved:8 say a size, too",
        ),
    ] = None,
    cp: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="ranks; one if not said, or as many as folders hold")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help=f"one of {PROFILE_NAMES} (docs/precision.md); or FILE.json, written by cpjax fingerprint --profile",
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            metavar="ring|gather|ascending|unknown|together",
            help="in which order the ranks' results were merged; together: nothing was merged",
        ),
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """See DUMP_HELP."""
    from dataclasses import replace

    from cpjax.crosscheck.dumps.gradients import check_given, judge_dumped_gradients
    from cpjax.crosscheck.dumps.judge_dump import judge_dump as judge_question
    from cpjax.crosscheck.dumps.names import named
    from cpjax.crosscheck.dumps.question import Question
    from cpjax.crosscheck.run.session import Judged, Shown

    with errors():
        free(report)
        files = {"query": query, "key": key, "value": value, "out": out, "lse": lse, "sink": sink}
        found = {} if file is None else named(file, names, frozenset(name for name, x in files.items() if x))
        if file is None and names is not None:
            raise InputError("--names is of the tensors in FILE; give the file")
        missing = [f"--{x}" for x in ("query", "key", "value", "out") if not files[x] and x not in found]
        if missing:
            raise InputError(f"{', '.join(missing)} missing: say them, or give one FILE that holds all tensors")
        question = Question(
            query=tuple(query or [found["query"]]), key=tuple(key or [found["key"]]), value=value or found["value"],
            out=out or found["out"], lse=lse or found.get("lse"), scale=scale, is_causal=causal, layout=layout_of,
            positions=positions, align=align, lengths=whole_numbers(lengths), segments=segments,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cu_seqlens_padded=cu_seqlens_padded,
            block_table=block_table, seq_lens=seq_lens, sink=sink or found.get("sink"), softcap=softcap, window=window,
            alibi=alibi, bias=bias, key_scale=kv_scale if key_scale is None else key_scale,
            value_scale=kv_scale if value_scale is None else value_scale, partition=partition, cp=cp,
            precision=precision, order=order, lse_base=lse_base, lse_layout=lse_layout,
        )  # fmt: skip
        gradients = {"dout": dout, "dq": dq, "dk": dk, "dv": dv}
        is_backward = check_given(gradients)
        said = judge_question(question)
        backward, taken = None, []
        if is_backward:
            backward, taken = judge_dumped_gradients(said, gradients, ds, rounded_every, over_ranks)
        for remark in [*said.remarks, *taken]:
            print(f"cpjax: {remark}", file=sys.stderr)
        name = question.out.name
        verdict, remarks = said.verdict, tuple(said.verdict.remarks)
        judged = Judged(
            name, "dump", verdict.precision, verdict.order, verdict=verdict, remarks=remarks, about=said.about
        )
        if report is not None:
            # What is no result at all, by its form, cannot be drawn.
            shown = Shown(said.problem, said.out, said.lse)
            shown = None if "form" in verdict.failed_tests else shown
            judged = replace(judged, shown=shown, remarks=(*said.remarks, *remarks))
        report_to(report, [judged], "cpjax judge-dump")
        show([judged], as_json, asked=True, provenance=True, backward=backward)


def main() -> None:
    """The entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
