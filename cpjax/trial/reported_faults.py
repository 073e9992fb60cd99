"""The faults that people report most, made in plain NumPy, with the words that name each (docs/diagnosis.md).

Beside each fault what its problem must state: a softcap, a sink, a window, …
"""

from dataclasses import replace
from functools import partial

import numpy as np

from cpjax.trial.fault_case import LN2, Reported
from cpjax.trial.key_faults import (
    head_mod,
    key_weighted,
    keys_of_another,
    neighbours_value,
    page_of_one_row,
    run_across,
    run_weighted,
    stale_block,
    values_of_another,
)
from cpjax.trial.logit_faults import (
    MSCALE_SQUARED,
    alibi_applied,
    alibi_negated,
    averaged,
    fp16_accumulator,
    named_scales,
    overflow,
    rounded_to,
    scaled,
    scaled_by_any,
    scaled_near,
    slopes_of,
    softcap_applied,
    without,
)
from cpjax.trial.mask_faults import (
    drafts_alike,
    fewer_every,
    local_lengths,
    mask_absent,
    mask_applied,
    mask_in_blocks,
    off_by_request,
    pads_leaked,
    prefix_dropped,
    requests_mixed,
    shifted,
    top_left,
    window_applied,
    window_ignored,
)
from cpjax.trial.merge_faults import LSE_FORMS, lse_as, lse_nan, not_rescaled, page_of_zeros, sink_added, wrong_base
from cpjax.trial.problem import Problem
from cpjax.trial.row_faults import (
    all_zero,
    axes_exchanged,
    batch_exchanged,
    heads_exchanged,
    out_times,
    ranks_exchanged,
    requests_exchanged,
    unwritten,
)


def _softcap(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, softcap=5.0, scale=2 * problem.scale)


def _sink(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, sink=rng.uniform(0, 4, problem.query.shape[2]).astype(np.float32))


def _alibi(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, alibi=slopes_of(problem))


def _bias(problem: Problem, rng: np.random.Generator) -> Problem:
    (batch, length, heads, _), keys = problem.query.shape, problem.key.shape[1]
    return replace(problem, bias=rng.standard_normal((batch, heads, length, keys)).astype(np.float32))


def _window(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, window=int(rng.integers(8, 30)))


def _near_overflow(problem: Problem, rng: np.random.Generator) -> Problem:
    if problem.query.dtype != np.float16:
        return problem
    query, key = (rng.standard_normal(x.shape) + mean for x, mean in ((problem.query, 20), (problem.key, 102)))
    return replace(problem, query=query, key=key).cast("float16")


REPORTED: dict[str, Reported] = {
    "natural lse merged by exp2": Reported(partial(wrong_base, is_natural=True)),
    "lse in base two merged by exp": Reported(partial(wrong_base, is_natural=False)),
    "merges not rescaled": Reported(not_rescaled),
    **{f"lse: {form}": Reported(partial(lse_as, form=form, words=words)) for form, words in LSE_FORMS.items()},
    "lse of one row NaN": Reported(lse_nan),
    "sink added": Reported(sink_added),
    "page of zero keys": Reported(page_of_zeros),
    "sink dropped": Reported(partial(without, term="sink", words="the sink was not added to the sums"), _sink),
    "last rows zero": Reported(partial(unwritten, fill=0.0)),
    "last rows a pattern": Reported(partial(unwritten, fill=7.5)),
    "all zero": Reported(all_zero),
    "out × 0.97": Reported(partial(out_times, factor=0.97)),
    "batch rows exchanged": Reported(batch_exchanged),
    "requests exchanged": Reported(requests_exchanged),
    "heads exchanged": Reported(heads_exchanged),
    "ranks exchanged": Reported(ranks_exchanged),
    "axes exchanged": Reported(axes_exchanged),
    "causal mask shifted": Reported(partial(shifted, most=6)),
    "one key too few every 8 queries": Reported(fewer_every),
    "drafts see alike": Reported(drafts_alike),
    "local lengths": Reported(local_lengths),
    "lengths off by one a request": Reported(off_by_request),
    "top-left for bottom-right": Reported(top_left),
    "causal mask absent": Reported(mask_absent),
    "causal mask applied": Reported(mask_applied),
    "causal mask in each block": Reported(mask_in_blocks),
    "window applied": Reported(window_applied),
    "window ignored": Reported(window_ignored, _window),
    "requests mixed": Reported(requests_mixed),
    "pads leaked": Reported(pads_leaked),
    "prefix dropped": Reported(prefix_dropped),
    "run of keys lost": Reported(partial(run_weighted, weight=0.0)),
    "run of keys doubled": Reported(partial(run_weighted, weight=2.0)),
    "run lost across a border": Reported(partial(run_across, weight=0.0)),
    "run doubled across a border": Reported(partial(run_across, weight=2.0)),
    "page lost of one batch row": Reported(page_of_one_row),
    "key lost": Reported(partial(key_weighted, weight=0.0)),
    "key doubled": Reported(partial(key_weighted, weight=2.0)),
    "stale block": Reported(stale_block),
    "keys of another head": Reported(keys_of_another),
    "values of another head": Reported(values_of_another),
    "head h mod K": Reported(head_mod),
    "values of the next token": Reported(partial(neighbours_value, shift=1)),
    "values of the token before": Reported(partial(neighbours_value, shift=-1)),
    **{f"scale {name}": Reported(partial(scaled, factor=x, words=words)) for name, x, words in named_scales()},
    "scale off": Reported(scaled_by_any),
    "scale nearly × log2(e)": Reported(partial(scaled_near, factor=1 / LN2)),
    "scale nearly without mscale²": Reported(partial(scaled_near, factor=1 / MSCALE_SQUARED)),
    "queries and keys ignored": Reported(averaged),
    "softcap applied": Reported(softcap_applied),
    "softcap ignored": Reported(partial(without, term="softcap", words="the softcap was not applied"), _softcap),
    "ALiBi applied": Reported(alibi_applied),
    "ALiBi ignored": Reported(partial(without, term="alibi", words="the ALiBi slopes were not applied"), _alibi),
    "ALiBi negated": Reported(alibi_negated, _alibi),
    "bias ignored": Reported(partial(without, term="bias", words="the bias was not added"), _bias),
    "q·k beyond FP16": Reported(overflow, _near_overflow),
    "scores in FP16": Reported(partial(rounded_to, step="score", fmt="float16", words="scores rounded to FP16")),
    "probabilities in BF16": Reported(
        partial(rounded_to, step="probability", fmt="bfloat16", words="probabilities rounded to BF16")
    ),
    "chunk results in BF16": Reported(
        partial(rounded_to, step="carry", fmt="bfloat16", words="chunk results stored in BF16")
    ),
    "accumulator in FP16": Reported(fp16_accumulator),
}
"""By name. docs/diagnosis.md lists what is named."""
