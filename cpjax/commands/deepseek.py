"""`cpjax checkpoint` and `cpjax generate`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cpjax.commands.common import DONE, Json, errors, progress, whole_numbers
from cpjax.errors import InputError

GENERATED = (
    "Exit status: 0 done, 1 with --check: one device gives something else, or it cannot be told, 2 bad input (one line "
    "says what and how to mend it)."
)

LAST = "turn|mindie"

app = typer.Typer()

CHECKPOINT_HELP = """Write a random DeepSeek checkpoint into a new folder: true structure and names, small numbers.

config.json, safetensors and their index, as Hugging Face writes them. --like takes the numbers of another config.json.

--quantize writes the same weights as the vendor's tool does, with its description file: attention in W8A8 and all MLPs
in W8A8 with a scale per token (w8a8), all of them with a scale per token (w8a8-dynamic), or as w8a8 but routed experts
in W4A8 (w4a8).

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
    quantize: Annotated[
        str | None, typer.Option(help="how layers are quantised", metavar="w8a8|w8a8-dynamic|w4a8")
    ] = None,
) -> None:
    """See CHECKPOINT_HELP."""
    from cpjax.deepseek.checkpoint import open_checkpoint, write_random
    from cpjax.deepseek.config import SMALL, read_config
    from cpjax.deepseek.quantized_checkpoint import write_quantized
    from cpjax.wording import counted

    with errors():
        config = SMALL if like is None else read_config(like)
        if quantize is None:
            files = write_random(folder, config, seed, dtype=dtype)
        else:
            files = write_quantized(folder, config, seed, quantize, dtype=dtype)
        count = len(open_checkpoint(folder).files)
    size = sum(file.stat().st_size for file in files)
    if as_json:
        said = {"folder": str(folder), "files": [file.name for file in files], "bytes": size}
        said |= {"tensors": count, "dtype": dtype, "seed": seed, "quantize": quantize}
        print(json.dumps(said, indent=2))
    else:
        print(f"{count} tensors, {size:,} bytes in {counted(len(files), 'file')}, in {folder}")
        print(f"Next: cpjax generate {folder} --prompt-ids 1,2,3 --cp 2 --steps 8 --check")


GENERATE_HELP = """Prefill prompts under context parallelism, and decode greedily over the sharded cache of latents.

MODEL is the folder of a DeepSeek-V3 checkpoint, of floats or quantised by the vendor's tool to W8A8 or W4A8. Devices
are simulated: cp ranks share the tokens, tp ranks the heads, both together the experts. --config takes cp, tp and sp of
a MindIE deployment, and how many tokens its MTP drafts; --decode-config the decode node's ranks of a disaggregated one.
A user_config.json has both.

--sp cuts the cache over the tp ranks as well. --draft N lets the checkpoint's MTP modules guess N tokens for each step,
which verifies them: the tokens are the same, and how many guesses were right is printed. --decode-tp N hands the caches
over to a decode instance of N ranks, as in a disaggregated deployment; with --draft it is this instance that drafts.

--check does the same on one device, in float64: logits must agree to 1e-10, and every token must be the same. Where
attention has a half format (--precision flash_fp16), it draws roundings, and each logit must lie within what they
explain. With --arithmetic vendor, quantised layers are computed with the roundings of the vendor's hardware; results
depend on tp then.

A prompt is --prompt-ids, or --text where the folder has a tokenizer.json: what is generated is then printed as text,
too. Several prompts are prefilled together in one row, each cut for itself, as MindIE packs a batch; with --cached some
of their tokens are in the cache before.

Examples:

\b
cpjax generate build/small --prompt-ids 1,2,3,4,5 --cp 2 --steps 8 --check

\b
cpjax generate build/small --prompt-ids 1,2,3,4,5 --prompt-ids 6,7,8 \\
    --cached 4,0 --check
"""


@app.command(help=GENERATE_HELP, short_help="run a DeepSeek checkpoint, prompt to tokens", epilog=GENERATED)
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the folder of a checkpoint")],
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="token ids with commas; once for each prompt", metavar="ID,…")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="a prompt as text, by MODEL's tokenizer.json (cpjax[text]); once for each", metavar="PROMPT"),
    ] = None,
    cached: Annotated[
        str | None,
        typer.Option(help="tokens of each prompt that are in the cache already; none if not said", metavar="N,…"),
    ] = None,
    cp: Annotated[
        int | None, typer.Option(min=1, help="ranks over which tokens are cut; 2 if not said", metavar="N")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="ranks over which heads are cut; 1 if not said", metavar="N")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="a MindIE config.json, for its cp, tp, sp and drafts", metavar="FILE"),
    ] = None,
    decode_config: Annotated[
        Path | None, typer.Option(help="that of the decode node; --config is the prefill node's then", metavar="FILE")
    ] = None,
    sp: Annotated[bool, typer.Option("--sp", help="cut the cache over the tp ranks too, not over cp alone")] = False,
    steps: Annotated[int, typer.Option(min=1, help="new tokens", metavar="N")] = 8,
    block: Annotated[int, typer.Option(min=1, help="tokens of a block of the cache", metavar="N")] = 128,
    last_block: Annotated[
        str | None,
        typer.Option(
            help="where a prompt's last block lies: in turn, or on the last rank as in MindIE, and with --config if "
            "not said",
            metavar=LAST,
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the prompt that are prefilled at once; all if not said", metavar="N"),
    ] = None,
    decode_tp: Annotated[
        int | None,
        typer.Option(min=1, help="ranks of a decode instance that takes the cache over; none if not said", metavar="N"),
    ] = None,
    draft: Annotated[
        int | None,
        typer.Option(
            min=0, help="tokens that MTP modules guess for a step; the deployment's, or 0, if not said", metavar="N"
        ),
    ] = None,
    border: Annotated[
        str,
        typer.Option(help="how the modules' prefill finds the token after a chunk's last", metavar="exact|vendor"),
    ] = "exact",
    exchange: Annotated[
        str, typer.Option(help="how latents meet queries", metavar="ring|ring_both_ways|gather|pass_query")
    ] = "ring",
    dtype: Annotated[str, typer.Option(help="everything is computed in it", metavar="float64|float32")] = "float64",
    precision: Annotated[
        str | None,
        typer.Option(help="profile of attention, see docs/precision.md; dtype's if not said", metavar="PROFILE"),
    ] = None,
    arithmetic: Annotated[str, typer.Option(help="of quantised layers", metavar="exact|vendor")] = "exact",
    check: Annotated[bool, typer.Option("--check", help="compare with one device; exit 1 if it differs")] = False,
    as_json: Json = False,
) -> None:
    """See GENERATE_HELP."""
    import jax

    from cpjax.deepseek.config import read_config
    from cpjax.deepseek.generate import Sharing
    from cpjax.deepseek.simulate import Request, chosen, run
    from cpjax.deepseek.tokenizer import open_tokenizer
    from cpjax.parallel import simulate_devices

    with errors():
        if bool(prompt_ids) == bool(text):
            raise InputError("give the prompts once: as --prompt-ids ID,… or as --text PROMPT")
        tokenizer = open_tokenizer(model) if text else None
        ids = tuple(whole_numbers(one, "--prompt-ids") or () for one in prompt_ids or ())
        if tokenizer is not None:
            ids = tuple(tokenizer.encode(one) for one in text or ())
        shape = read_config(model) if model.is_dir() else None
        if last_block not in (None, *LAST.split("|")):
            raise InputError(f"--last-block is {last_block!r:.60}; it must be {LAST.replace('|', ' or ')}")
        found = chosen(cp, tp, config, shape, is_sp=sp, decode=decode_config, decode_tp=decode_tp)
        is_last_moved = config is not None if last_block is None else last_block == "mindie"
        request = Request(
            model,
            ids,
            steps,
            found.sizes,
            Sharing(block, found.is_sp, is_last_moved),
            exchange,
            dtype,
            precision,
            check,
            chunk,
            found.draft if draft is None else draft,
            border,
            arithmetic,
            found.decode_tp,
            whole_numbers(cached, "--cached"),
        )
        for remark in found.remarks:
            print(f"cpjax: {remark}", file=sys.stderr)
        simulate_devices(request.devices)
        with jax.enable_x64(dtype == "float64"), progress() as advance:
            said = run(request, advance)
    new = said.generated.ids.tolist()
    continued = [None] * len(new) if tokenizer is None else [tokenizer.decode(row) for row in new]
    if as_json:
        printed = said.as_json()
        printed["requests"] = [one | {"text": text} for one, text in zip(printed["requests"], continued, strict=True)]
        print(json.dumps(printed, indent=2, allow_nan=False))
    else:
        print(said.text())
        for one in continued if tokenizer else ():
            print(f"text: {one!r}")
    raise typer.Exit(0 if said.passed else 1)
