"""`cpjax generate`: a checkpoint, prompts and a number of ranks in; tokens, times and a check out."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cpjax.deepseek.checkpoint import Advance, Checkpoint, check_computed, load, load_mtp, open_checkpoint
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.draft import Drafted
from cpjax.deepseek.generate import Decoder, Generated, Sharing, generate, rows_of, texts_of
from cpjax.deepseek.logit_error import DRAWS, FAR, Rounds, count_other_experts
from cpjax.deepseek.mtp import MtpWeights
from cpjax.deepseek.one_device import Checked, check, filled
from cpjax.deepseek.parallel import Setup, checked_ids, model_mesh, mtp_specs, setup, specs
from cpjax.deepseek.quantized_ties import NEAR, Near, count_near_ties
from cpjax.errors import InputError
from cpjax.mindie.crosscheck import accepted, accepted_pair, is_pair
from cpjax.partition import Zigzag
from cpjax.precision import FORMAT, precision_of
from cpjax.wording import counted

MOST_DEVICES = 64
MOST_SCALED = 8
"""Devices that a deployment of more cards is scaled down to."""

OWN_MAXIMA = (
    "in the vendor's arithmetic each rank of tp takes the scale of a token from its own columns of o_proj and "
    "down_proj, so results depend on tp; in exact arithmetic they do not"
)
"""Why a check of the vendor's arithmetic fails under tp."""


class Request(NamedTuple):
    """What is asked for; sizes are (cp, tp)."""

    model: Path
    prompts: tuple[tuple[int, ...], ...]
    """Token ids; several prompts are packed into one row."""
    steps: int
    sizes: tuple[int, int]
    sharing: Sharing
    exchange: str
    dtype: str
    precision: str | None
    is_checked: bool
    chunk: int | None = None
    draft: int = 0
    border: str = "exact"
    arithmetic: str = "exact"
    decode_tp: int | None = None
    """Ranks of a decode instance of its own; None: the prefill's decode."""
    cached: tuple[int, ...] | None = None
    """How many tokens of each prompt are in the cache already; None: none."""

    @property
    def devices(self) -> int:
        """Of both instances.

        Raises:
          InputError: more than are simulated.
        """
        count = self.sizes[0] * self.sizes[1] + (self.decode_tp or 0)
        if count > MOST_DEVICES:
            more = f" and the decode instance's {self.decode_tp}" if self.decode_tp else ""
            raise InputError(f"cp·tp{more} is {count}; at most {MOST_DEVICES} devices are simulated")
        return count


class Said(NamedTuple):
    """The answer."""

    request: Request
    precision: str
    generated: Generated
    checked: Checked | None
    kinds: tuple[str, ...] = ()
    """Quantisations of the checkpoint; none: all is float."""
    reason: str | None = None
    """What may be the reason of a failed check."""
    is_open: bool = False
    """The check failed, and rounding may be why: it decides to which experts a token goes."""

    @property
    def passed(self) -> bool:
        """Also where nothing was checked."""
        return self.checked is None or self.checked.passed

    def as_json(self) -> dict[str, Any]:
        """For `--json`; a NaN is null."""
        request, checked = self.request, self.checked
        cp, tp = request.sizes
        said = {"model": str(request.model), "cp": cp, "tp": tp, "exchange": request.exchange, "chunk": request.chunk}
        said |= {"sp": request.sharing.is_sp, "block": request.sharing.block}
        said |= {"last block": "mindie" if request.sharing.is_last_moved else "turn"}
        said |= {"dtype": request.dtype, "precision": self.precision, "requests": self._requests()}
        said |= {"seconds": self.generated.seconds, "check": None}
        fetched = {"tp": request.decode_tp, "bytes a rank": self.generated.handed_over}
        said["decode instance"] = fetched if request.decode_tp else None
        drafted = self.generated.drafted
        said["draft"] = (
            None
            if drafted is None
            else {
                "tokens a step": drafted.tokens,
                "border": request.border,
                "steps": drafted.steps,
                "drafted": drafted.tokens * sum(map(len, drafted.accepted)),
                "accepted": sum(map(sum, drafted.accepted)),
            }
        )
        said |= {"quantised": list(self.kinds), "arithmetic": request.arithmetic if self.kinds else None}
        if checked is not None:
            difference = checked.difference if np.isfinite(checked.difference) else None
            said["check"] = {
                "passed": checked.passed,
                "largest difference of a logit": difference,
                "in": "standard deviations of its rounding" if checked.is_in_sigma else "logits",
                "allowed": checked.allowed if np.isfinite(checked.allowed) else None,
                "first step with another token": checked.other,
                "reason": self.reason,
                "cannot tell": self.is_open,
            }
        return said

    def _requests(self) -> list[dict[str, Any]]:
        cached = self.request.cached or [0] * len(self.request.prompts)
        of_rows = zip(self.request.prompts, cached, self.generated.ids.tolist(), strict=True)
        return [{"prompt": list(prompt), "cached": count, "tokens": new} for prompt, count, new in of_rows]

    def text(self) -> str:
        """For a person."""
        cp, tp = self.request.sizes
        seconds, drafted = self.generated.seconds, self.generated.drafted
        count = self.generated.ids.shape[1] - 1 if drafted is None else drafted.steps
        further = f", {seconds['further steps'] / (count - 1):.3f} s each of {count - 1} more" if count > 1 else ""
        first = f"; first step {seconds['first step']:.1f} s (compiled)" if count else ""
        tokens = [", ".join(map(str, row)) for row in self.generated.ids.tolist()]
        lines = [
            *(f"tokens{f' of request {n}' if len(tokens) > 1 else ''}: {row}" for n, row in enumerate(tokens)),
            f"cp {cp}, tp {tp}{_shared(self.request)}, exchange {self.request.exchange}, {self.request.dtype}, "
            f"attention {self.precision}",
            f"prefill of {_prefilled(self.request)} {seconds['prefill']:.1f} s (compiled){first}{further}",
        ]
        if self.generated.handed_over is not None:
            lines.append(
                f"handed over to {counted(self.request.decode_tp or 0, 'decode rank')}: each fetched "
                f"{self.generated.handed_over:,} bytes of latents; {seconds['hand-over']:.1f} s"
            )
        if drafted is not None:
            lines.append(_drafts(drafted, self.request.border))
        if self.kinds:
            lines.append(f"quantised: {', '.join(self.kinds)}; arithmetic {self.request.arithmetic}")
        if self.checked is not None:
            failed = "cannot tell whether it agrees with one device" if self.is_open else "DIFFERS from one device"
            word = "agrees with one device" if self.checked.passed else failed
            within = ", within rounding" if self.checked.passed else ""
            other = "" if self.checked.other is None else f"; another token at step {self.checked.other}{within}"
            lines.append(f"check: {word}, logits differ by at most {_difference(self.checked)}{other}")
        if self.reason is not None:
            lines.append(f"reason: {self.reason}")
        return "\n".join(lines)


def _difference(checked: Checked) -> str:
    if checked.is_in_sigma:
        return f"{checked.difference:.1f} standard deviations of their rounding ({checked.allowed:.1f} allowed)"
    return f"{checked.difference:.1e} ({checked.allowed:.1e} allowed)"


def _shared(request: Request) -> str:
    """How the cache lies, where that is not the usual."""
    cp, tp = request.sizes
    sp = f", sp {tp} (the cache is cut over {cp * tp} ranks)" if request.sharing.is_sp else ""
    return sp + (", the prompt's last block on the last rank" if request.sharing.is_last_moved else "")


def _prefilled(request: Request) -> str:
    """How many tokens of how many requests."""
    every = counted(sum(map(len, request.prompts)), "token")
    packed = "" if len(request.prompts) == 1 else f" of {len(request.prompts)} requests in one row"
    return every + packed + (f", {sum(request.cached)} of them cached before," if request.cached else "")


def _drafts(drafted: Drafted, border: str) -> str:
    made = drafted.tokens * sum(map(len, drafted.accepted))
    return (
        f"drafts: {counted(drafted.tokens, 'token')} a step, border {border}; {sum(map(sum, drafted.accepted))} of "
        f"{made} accepted, {counted(drafted.steps, 'step')}"
    )


class Deployed(NamedTuple):
    """Where a request is computed, and what is drafted: as asked for, or as a deployment does, scaled down."""

    sizes: tuple[int, int]
    """cp and tp."""
    is_sp: bool
    """The cache is cut over both."""
    draft: int
    """Tokens that MTP modules guess for a step."""
    decode_tp: int | None
    """Ranks of the decode instance of a disaggregated deployment."""
    remarks: tuple[str, ...]
    """For the user."""


def chosen(
    cp: int | None,
    tp: int | None,
    config: Path | None,
    model: DeepseekConfig | None,
    *,
    is_sp: bool = False,
    decode: Path | None = None,
    decode_tp: int | None = None,
) -> Deployed:
    """What the options or the configs of a deployment say.

    Raises:
      InputError: options beside a deployment that has them; sp without ranks of tp.
    """
    if config is None:
        if decode is not None:
            raise InputError("--decode-config is the second of two configs; give the prefill node's as --config")
        if is_sp and (tp or 1) == 1:
            raise InputError("--sp cuts the cache over the ranks of tp as well; give --tp of at least 2 with it")
        return Deployed((cp or 2, tp or 1), is_sp, 0, decode_tp, ())
    if cp is not None or tp is not None or is_sp:
        raise InputError("--config has cp, tp and sp; leave out --cp, --tp and --sp, or --config")
    found = deployed(config, decode, model)
    if decode_tp is not None and found.decode_tp is not None:
        raise InputError("the decode node's config has its tp; leave out --decode-tp, or that config")
    return found._replace(decode_tp=decode_tp or found.decode_tp)


def deployed(config: Path, decode: Path | None, model: DeepseekConfig | None) -> Deployed:
    """A MindIE deployment's cp, tp and sp, and MTP's num_speculative_tokens.

    Its tp is scaled down to at most `MOST_SCALED` devices an instance, and to what divides the model's heads; its sp,
    where it has one, with it. Of a decode instance with dp one group is simulated.

    Args:
      config: of a hybrid or a prefill node, or MindIE-Motor's user_config.json.
      decode: of a decode node; None: there is none, unless `config` has it.

    Raises:
      InputError: what cannot be read, or what MindIE does not take.
    """
    if decode is None and not is_pair(config):
        found, there = accepted(config), None
    else:
        found, there = accepted_pair(config, decode)
    cp, tp = found.sizes.cp, found.sizes.tp
    fits, remarks = _scaled(tp, cp, model), list(found.warnings)
    is_sp = found.sizes.sp > 1 and fits > 1
    if fits != tp:
        sp = f", sp {fits} with it" if is_sp else ""
        remarks.append(f"scaled down: tp {fits} instead of the deployment's {tp}{sp}; cp {cp} as it is")
    draft = found.num_speculative_tokens or 0 if "mtp" in found.plugins else 0
    decode_tp = None
    if there is not None:
        decode_tp = _scaled(there.sizes.tp, 1, model)
        remarks += there.warnings
        if decode_tp != there.sizes.tp:
            remarks.append(f"scaled down: tp {decode_tp} instead of the decode node's {there.sizes.tp}")
        if there.sizes.dp > 1:
            remarks.append(f"scaled down: one of the decode node's {there.sizes.dp} groups of dp is computed")
    return Deployed((cp, fits), is_sp, draft, decode_tp, tuple(remarks))


def _scaled(tp: int, cp: int, model: DeepseekConfig | None) -> int:
    """The largest divisor of tp that is simulated, and that divides the heads."""
    heads = tp if model is None else model.num_attention_heads
    fits = [n for n in range(1, tp + 1) if tp % n == 0 and heads % n == 0 and cp * n <= max(cp, MOST_SCALED)]
    return fits[-1]


def run(request: Request, advance: Advance) -> Said:
    """Read, generate, check. JAX must have the devices of both instances, and float64 if that is asked for.

    Raises:
      InputError: whatever does not fit, before a weight is read.
    """
    if request.is_checked and request.dtype != "float64":
        raise InputError("--check is made in float64; leave out --dtype")
    precision = precision_of(request.precision, request.dtype)
    if request.is_checked and precision.name != "float64" and precision.out not in FORMAT:
        raise InputError(
            f"--check knows the rounding of attention in a half format, and none of precision {precision.name}; leave "
            "out --check, or --precision"
        )
    check_computed(request.dtype)
    arithmetic = request.arithmetic
    if arithmetic not in ("exact", "vendor"):
        raise InputError(f"--arithmetic {arithmetic!r:.60} is unknown; give exact or vendor")
    checkpoint = open_checkpoint(request.model)
    config, kinds = checkpoint.config, tuple(sorted(set(checkpoint.quantized.values())))
    if arithmetic != "exact" and not kinds:
        raise InputError(f"{request.model} is not quantised, so --arithmetic changes nothing; leave it out")
    ids, lengths = rows_of(request.prompts)
    prompts = {"lengths": lengths, "cached": request.cached, "is_packed": len(lengths) > 1}
    checked_ids(config, ids)
    options = {"dtype": request.dtype, "precision": request.precision, "exchange": request.exchange}
    how = setup(config, model_mesh(*request.sizes), **options, arithmetic=arithmetic)
    decode = None
    if request.decode_tp is not None:
        mesh = model_mesh(1, request.decode_tp, first=request.sizes[0] * request.sizes[1])
        decode = setup(config, mesh, **options, arithmetic=arithmetic)
    modules = _modules(checkpoint, request, how)
    weights = load(checkpoint, request.dtype, mesh=how.mesh, specs=specs(config), advance=advance)
    decoder = None
    if decode is not None:
        there = load(checkpoint, request.dtype, mesh=decode.mesh, specs=specs(config))
        decoder = Decoder(decode, there, _modules(checkpoint, request, decode))
    generated = generate(
        how,
        weights,
        ids,
        request.steps,
        **prompts,
        sharing=request.sharing,
        chunk=request.chunk,
        modules=modules,
        draft=request.draft,
        border=request.border,
        decoder=decoder,
        advance=advance,
    )
    checked, reason, is_open = None, None, False
    if request.is_checked:
        alone = load(checkpoint, request.dtype)
        rounds = rounds_of(request, how) if precision.out in FORMAT else None
        checked = check(config, alone, ids, generated, arithmetic, lengths=lengths, rounds=rounds)
        if not checked.passed and rounds is not None:
            text, _ = filled(ids, generated, lengths)
            changed = partial(count_other_experts, config, alone, text, jnp.asarray(lengths), rounds, arithmetic)
            draws = [int(changed(times=times)) for times in (1.0, FAR)]
            reason, is_open = reason_of_experts(*draws), any(draws)
        elif kinds and not checked.passed and arithmetic == "vendor" and request.sizes[1] > 1:
            reason = OWN_MAXIMA
        elif kinds and not checked.passed:
            texts = texts_of(ids, generated, lengths)
            near = [count_near_ties(config, alone, jnp.asarray(text[None]), arithmetic) for text in texts]
            reason = reason_of(Near(*map(sum, zip(*near, strict=True))))
    return Said(request, how.attention.precision.name, generated, checked, kinds, reason, is_open)


def _modules(checkpoint: Checkpoint, request: Request, how: Setup) -> tuple[MtpWeights, ...]:
    """The MTP modules on the devices of an instance, where they draft."""
    if not request.draft:
        return ()
    return load_mtp(checkpoint, request.dtype, mesh=how.mesh, specs=mtp_specs(checkpoint.config))


def rounds_of(request: Request, how: Setup) -> Rounds:
    """Where a deployment's attention rounds: the chunks of its prefill, and the ranks that a decode merges."""
    cp, tp = request.sizes
    ranks = request.decode_tp if request.decode_tp else cp * tp if request.sharing.is_sp else cp
    return Rounds(how.attention.precision, Zigzag(cp).chunks_per_rank * cp, ranks)


def reason_of_experts(now: int, far: int) -> str:
    """Whether rounding decides on the experts of a token, which moves logits by more than their σ says.

    Args:
      now, far: in how many draws it does, with roundings as they are and `FAR` times as large.

    >>> reason_of_experts(0, 0)
    'roundings 6 times as large send no token to other experts, so that is not why'
    """
    if now:
        return (
            f"in {now} of {DRAWS} draws of the roundings a token goes to other experts, so that their errors are not "
            "normal; check with another prompt"
        )
    if far:
        return (
            f"in none of {DRAWS} draws of the roundings a token goes to other experts, but in {far} with roundings "
            f"{FAR:g} times as large; check with another prompt"
        )
    return f"roundings {FAR:g} times as large send no token to other experts, so that is not why"


def reason_of(found: Near) -> str:
    """Whether ties may be the reason that a quantised model differs from one device.

    >>> reason_of(Near(0, 96))
    'none of 96 quantised activations lies within 1e-13 of a tie in rounding, so that is not why'
    """
    near = f"of {found.all} quantised activations lies within {NEAR:.0e} of a tie in rounding"
    if not found.near:
        return f"none {near}, so that is not why"
    return f"{found.near} {near}, where the order of sums decides on an integer; check with another prompt"
