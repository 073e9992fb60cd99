"""The command `cpjax`. Errors of users exit 2 with one line, a failed verdict exits 1, success 0, Ctrl-C 130."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cpjax.errors import InputError

SHOWN = (
    *("judge-dump", "judge", "cases", "examples", "crosscheck", "checkpoint", "generate", "backends", "bench"),
    "mindie",
)
"""The commands in the order of the help: what most people come for stands first."""


class _Shown(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=SHOWN.index)


DONE = "Exit status: 0 done, 2 bad input (one line says what and how to mend it)."
GENERATED = (
    "Exit status: 0 done, 1 with --check: one device gives something else, 2 bad input (one line says what and how to "
    "mend it)."
)
JUDGED = (
    "Exit status: 0 everything agrees, 1 something is WRONG, not judgeable, or there is no result, 2 bad input (one "
    "line says what and how to mend it)."
)

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
"""

Report = Annotated[
    Path | None, typer.Option(help="write a page, DIR/index.html; nothing is overwritten", metavar="DIR")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


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
    with _errors():
        check_names(names)
        _free(report)
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
            with _progress() as advance:
                judged = list(judge_folder(cases, folder / "results", advance, draw=report is not None))
            compared = list(compare_folder(cases, folder / "results", judged))
        _report(report, judged, "cpjax crosscheck")
        _show(judged, as_json, compared)


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
    from cpjax.crosscheck.files.folders import read_cases
    from cpjax.crosscheck.run.explain import budgets_of, checked_rows
    from cpjax.crosscheck.run.session import judge_folder

    with _errors():
        _free(report)
        found = read_cases(cases)
        rows = checked_rows(explain or [], found)
        with _progress() as advance:
            draw = report is not None or bool(rows)
            judged = list(judge_folder(found, results, advance, draw=draw, workers=workers))
        budgets = list(budgets_of(judged, rows))
        _report(report, judged, "cpjax judge")
        _show(judged, as_json, budgets=budgets, asked=True)


CASES_HELP = """Write a set of cases into a new folder, with checksums, for any kernel to compute.

conformance: small cases of every kind, the same bytes everywhere; those come first whose outputs tell what is wrong.
Compute them (docs/formats.md), then: cpjax judge DIR RESULTS

Example: cpjax cases --preset conformance cases
"""


@app.command(help=CASES_HELP, short_help="write the conformance set: cases for a new kernel", epilog=DONE)
def cases(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet")],
    preset: Annotated[str, typer.Option(metavar="conformance", help="which set")] = "conformance",
    as_json: Json = False,
) -> None:
    """See CASES_HELP."""
    from cpjax.crosscheck.conformance.cases import VERSION, write_conformance

    with _errors():
        if preset != "conformance":
            raise InputError(f"--preset {preset!r} is unknown; known is conformance")
        written = write_conformance(folder)
    rows = [{"case": case.name, "digest": case.digest, "says": case.about["says"]} for case in written]
    if as_json:
        print(json.dumps({"preset": preset, "version": VERSION, "cases": rows}, indent=2))
    else:
        for row in rows:
            print(f"{row['case']}: {row['says']}")
        print(f"{len(rows)} cases, version {VERSION}, in {folder}. Next: cpjax judge {folder} RESULTS")


EXAMPLES_HELP = """Write the example configs and the documentation into a new folder.

Helps and messages name files under examples/ and docs/: they are there when you stand in this folder.

Example: cpjax examples cpjax-files
"""


@app.command(help=EXAMPLES_HELP, short_help="write the example configs and the docs", epilog=DONE)
def examples(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet")]) -> None:
    """See EXAMPLES_HELP."""
    from cpjax.shared import write_shared

    with _errors():
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

    with _errors():
        rows = [about(entry) for entry in installed().values()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['name']:<12} {row['package']} {row['version']}  {row['value']}")


BENCH_HELP = """Time the forward pass beside PyTorch's fused kernel and dense JAX: interleaved, medians.

Example: cpjax bench --tokens 8192 --heads 4 --head-dim 64 --json
"""


@app.command(help=BENCH_HELP, short_help="time the forward pass beside PyTorch and JAX", epilog=DONE)
def bench(
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="length of the sequence")] = 8192,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="query heads, and as many key/value heads")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="numbers a head")] = 64,
    cp: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="devices, simulated on a CPU: one for each core")
    ] = 2,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="runs of each contender that count")] = 5,
    as_json: Json = False,
) -> None:
    """See BENCH_HELP."""
    from cpjax import bench as bench_module
    from cpjax.parallel import simulate_devices

    with _errors():
        simulate_devices(cp)
        rows = bench_module.bench(tokens, heads, head_dim, cp, repeats)
        print(json.dumps([row._asdict() for row in rows], indent=2) if as_json else bench_module.table(rows))


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
        Path | None, typer.Argument(metavar="FILE", help="one file of several tensors: .safetensors, .npz, .pt")
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="query=NAME,…", help="of the tensors in FILE, if they have other names")
    ] = None,
    query: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="the queries")] = None,
    key: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="the keys")] = None,
    value: Annotated[Path | None, typer.Option(metavar="FILE", help="the values")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the result that is judged")] = None,
    lse: Annotated[Path | None, typer.Option(metavar="FILE", help="the logarithm of the softmax sum")] = None,
    lse_base: Annotated[str | None, typer.Option(metavar="e|2", help="base of the logarithm")] = None,
    lse_layout: Annotated[
        str | None,
        typer.Option(
            metavar="bsn|bns|tn|nt", help="axes; bsn1, … with an axis of 1 behind; bsn8, … of 8 equal numbers"
        ),
    ] = None,
    layout_of: Annotated[
        str | None,
        typer.Option(metavar="bsnd|bnsd|tnd", help="batch, sequence (of all requests: tokens), heads n, head dim"),
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
        str | None, typer.Option(metavar="PROFILE", help=f"one of {PROFILE_NAMES} (docs/precision.md)")
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

    from cpjax.crosscheck.dumps.judge_dump import judge_dump as judge_question
    from cpjax.crosscheck.dumps.names import named
    from cpjax.crosscheck.dumps.question import Question
    from cpjax.crosscheck.run.session import Judged, Shown

    with _errors():
        _free(report)
        found = {} if file is None else named(file, names)
        if file is None and names is not None:
            raise InputError("--names is of the tensors in FILE; give the file")
        files = {"query": query, "key": key, "value": value, "out": out}
        missing = [f"--{name}" for name, x in files.items() if not x and name not in found]
        if missing:
            raise InputError(f"{', '.join(missing)} missing: say them, or give one FILE that holds all tensors")
        question = Question(
            query=tuple(query or [found["query"]]), key=tuple(key or [found["key"]]), value=value or found["value"],
            out=out or found["out"], lse=lse or found.get("lse"), scale=scale, is_causal=causal, layout=layout_of,
            positions=positions, align=align, lengths=_whole_numbers(lengths), segments=segments,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cu_seqlens_padded=cu_seqlens_padded,
            block_table=block_table, seq_lens=seq_lens, sink=sink or found.get("sink"), softcap=softcap, window=window,
            alibi=alibi, bias=bias, key_scale=kv_scale if key_scale is None else key_scale,
            value_scale=kv_scale if value_scale is None else value_scale, partition=partition, cp=cp,
            precision=precision, order=order, lse_base=lse_base, lse_layout=lse_layout,
        )  # fmt: skip
        said = judge_question(question)
        for remark in said.remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        name = question.out.name
        judged = Judged(
            name, "dump", said.verdict.precision, said.verdict.order, verdict=said.verdict, about=said.about
        )
        if report is not None:
            # What is no result at all, by its form, cannot be drawn.
            shown = Shown(said.problem, said.out, said.lse)
            shown = None if "form" in said.verdict.failed_tests else shown
            judged = replace(judged, shown=shown, remarks=tuple(said.remarks))
        _report(report, [judged], "cpjax judge-dump")
        _show([judged], as_json, asked=True, provenance=True)


CHECKPOINT_HELP = """Write a random DeepSeek checkpoint into a new folder: true structure and names, small numbers.

config.json, safetensors and their index, as Hugging Face writes them. --like takes the numbers of another config.json.

Example: cpjax checkpoint build/small --seed 1
"""


@app.command(help=CHECKPOINT_HELP, short_help="write a small random DeepSeek checkpoint", epilog=DONE)
def checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet")],
    like: Annotated[
        Path | None, typer.Option(help="a checkpoint's config.json, for its numbers", metavar="FILE")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the weights", metavar="float16|bfloat16|float32|float64")] = "float16",
    seed: Annotated[int, typer.Option(min=0, help="of the weights, which are normally distributed", metavar="N")] = 0,
    as_json: Json = False,
) -> None:
    """See CHECKPOINT_HELP."""
    from cpjax.deepseek.checkpoint import write_random
    from cpjax.deepseek.config import SMALL, read_config
    from cpjax.deepseek.names import mtp_shapes, shapes
    from cpjax.wording import counted

    with _errors():
        config = SMALL if like is None else read_config(like)
        files = write_random(folder, config, seed, dtype=dtype)
    size, count = sum(file.stat().st_size for file in files), len(shapes(config) | mtp_shapes(config))
    if as_json:
        said = {"folder": str(folder), "files": [file.name for file in files], "bytes": size}
        print(json.dumps(said | {"tensors": count, "dtype": dtype, "seed": seed}, indent=2))
    else:
        print(f"{count} tensors, {size:,} bytes in {counted(len(files), 'file')}, in {folder}")
        print(f"Next: cpjax generate {folder} --prompt-ids 1,2,3 --cp 2 --steps 8 --check")


GENERATE_HELP = """Prefill a prompt under context parallelism, and decode greedily over the sharded cache of latents.

MODEL is the folder of a DeepSeek-V3 checkpoint that is not quantised. Devices are simulated: cp ranks share the tokens,
tp ranks the heads, both together the experts. --config takes cp and tp of a MindIE deployment.

--check does the same on one device, in float64: logits must agree to 1e-10, and every token must be the same.

Example:

\b
cpjax generate build/small --prompt-ids 1,2,3,4,5 --cp 2 --steps 8 --check
"""


@app.command(help=GENERATE_HELP, short_help="run a DeepSeek checkpoint, prompt to tokens", epilog=GENERATED)
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the folder of a checkpoint")],
    prompt_ids: Annotated[str, typer.Option(help="token ids with commas", metavar="ID,…")],
    cp: Annotated[
        int | None, typer.Option(min=1, help="ranks over which tokens are cut; 2 if not said", metavar="N")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="ranks over which heads are cut; 1 if not said", metavar="N")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="a MindIE config.json, for its cp and tp", metavar="FILE")] = None,
    steps: Annotated[int, typer.Option(min=1, help="new tokens", metavar="N")] = 8,
    block: Annotated[int, typer.Option(min=1, help="tokens of a block of the cache", metavar="N")] = 128,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the prompt that are prefilled at once; all if not said", metavar="N"),
    ] = None,
    exchange: Annotated[
        str, typer.Option(help="how latents meet queries", metavar="ring|ring_both_ways|gather|pass_query")
    ] = "ring",
    dtype: Annotated[str, typer.Option(help="everything is computed in it", metavar="float64|float32")] = "float64",
    precision: Annotated[
        str | None,
        typer.Option(help="profile of attention, see docs/precision.md; dtype's if not said", metavar="PROFILE"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="compare with one device; exit 1 if it differs")] = False,
    as_json: Json = False,
) -> None:
    """See GENERATE_HELP."""
    import jax

    from cpjax.deepseek.config import read_config
    from cpjax.deepseek.simulate import Request, ranks_of, run
    from cpjax.parallel import simulate_devices

    with _errors():
        ids = _whole_numbers(prompt_ids, "--prompt-ids") or ()
        shape = read_config(model) if model.is_dir() else None
        sizes, remarks = ranks_of(cp, tp, config, shape)
        request = Request(model, ids, steps, sizes, block, exchange, dtype, precision, check, chunk)
        for remark in remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        simulate_devices(sizes[0] * sizes[1])
        with jax.enable_x64(dtype == "float64"), _progress() as advance:
            said = run(request, advance)
    print(json.dumps(said.as_json(), indent=2, allow_nan=False) if as_json else said.text())
    raise typer.Exit(0 if said.passed else 1)


def _whole_numbers(text: str | None, option: str = "--lengths") -> tuple[int, ...] | None:
    """--lengths, --prompt-ids."""
    try:
        return None if text is None else tuple(int(n) for n in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r:.80} must be whole numbers with commas, as 512,300") from None


def main() -> None:
    """The entry point of the console script."""
    app()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        print(f"cpjax: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
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


def _free(report: Path | None) -> None:
    """Refuse a report that would overwrite something before anything is computed."""
    if report is not None:
        from cpjax.crosscheck.report.page import check_free

        check_free(report)


def _report(report: Path | None, judged: list, title: str) -> None:
    if report is not None:
        from cpjax.crosscheck.report.page import write_report

        print(f"cpjax: report: {write_report(report, judged, title)}", file=sys.stderr)


def _show(
    judged: list,
    as_json: bool,
    compared: list | None = None,
    budgets: list | None = None,
    *,
    asked: bool = False,
    provenance: bool = False,
) -> None:
    """Print everything and exit 1 unless everything that is supported passed, and agrees with each other."""
    from rich.console import Console

    from cpjax.crosscheck.run.compare import between_sentence
    from cpjax.crosscheck.run.summary import all_passed, questions, sentence, table_of

    pairs = compared or []
    passed = all_passed(judged) and all(one.agreement.agrees for one in pairs)
    summary = f"{sentence(judged)} {between_sentence(pairs)}".rstrip()
    if as_json:
        report = {"passed": passed, "summary": summary, "results": [one.as_json() for one in judged]}
        report["between"] = [one.as_json() for one in pairs]
        report["explained"] = [one.as_json() for one in budgets or []]
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table_of(judged))
        for one in judged:
            for reason in one.reasons if one.outcome in ("fail", "error") else []:
                console.print(f"{one.case}, {one.backend}: {reason}", highlight=False, markup=False)
            for remark in one.remarks:
                console.print(f"{one.case}, {one.backend}: {remark}", highlight=False, markup=False)
            for cause in one.verdict.diagnosis if one.verdict is not None else []:
                console.print(f"{one.case}, {one.backend}: diagnosis: {cause}", highlight=False, markup=False)
        for line in questions(judged) if asked else []:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for one in judged if provenance else []:
            for name, digest in one.about["files"].items():
                console.print(f"file: {name}, SHA-256 {digest}", highlight=False, markup=False, soft_wrap=True)
            versions = ", ".join(f"{name} {x}" for name, x in one.about["versions"].items())
            console.print(f"judged: {one.about['date']}, {versions}", highlight=False, markup=False)
        for backend, reason in dict.fromkeys((x.backend, x.unsupported) for x in judged if x.outcome == "unsupported"):
            which = [x.case for x in judged if (x.backend, x.unsupported) == (backend, reason)]
            names = ", ".join(which[:3]) + (f" and {len(which) - 3} more" if len(which) > 3 else "")
            console.print(f"unsupported by {backend}: {reason} ({names})", highlight=False, markup=False)
        for one in budgets or []:
            console.print(one.table())
        console.print(summary, highlight=False, markup=False)
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    main()
