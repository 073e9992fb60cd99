"""For the tests of other projects: `assert_attention` fails unless correct arithmetic explains a kernel's result.

It stands beside `torch.testing.assert_close` and `numpy.testing.assert_allclose`. There is no tolerance to choose:
the judge derives it for each element from the inputs and the precision (docs/testing.md).
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, cast

from cpjax.crosscheck.judge import judge
from cpjax.crosscheck.judging.asked import sentences
from cpjax.crosscheck.judging.verdict import Verdict

P = ParamSpec("P")

WIDTH = 96
"""Columns of a message; pytest puts `E   ` in front."""


def _takes_what(function: Callable[P, object]) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Give another function the signature of this one, for type checkers, editors and `help`."""

    def dress(other: Callable[..., None]) -> Callable[P, None]:
        vars(other)["__signature__"] = inspect.signature(function).replace(return_annotation=None)
        return cast("Callable[P, None]", other)

    return dress


@_takes_what(judge)
def assert_attention(*arguments: Any, **keywords: Any) -> None:
    """Fail unless correct arithmetic in the stated precision explains `out`, and `lse` if there is one.

    It takes what `cpjax.crosscheck.judge` takes: `query`, `key`, `value`, `out`, `lse=None`, then by name `scale`,
    `is_causal` (True unless said), `window`, `segment_ids`, `precision`, `sink` and the others. Arrays are those of
    torch (on any device), JAX or NumPy, `[batch, tokens, heads, head dim]`; tensors of PyTorch's
    `scaled_dot_product_attention` are `[batch, heads, tokens, head dim]`, so pass `x.transpose(1, 2)`.

    Raises:
      AssertionError: the result is wrong, or it holds a NaN or an infinity, or it has another form than attention of
        these inputs, or it cannot be judged. The message has the verdict with its reasons, the diagnosis, and what
        was asked and assumed.
      cpjax.errors.InputError: the question itself makes no sense; see `judge`.

    >>> import numpy as np
    >>> value = np.ones((1, 2, 1, 4), np.float32)
    >>> assert_attention(value, value, value, out=value)
    >>> assert_attention(value, value, value, out=2 * value)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: attention is WRONG: not what correct float32 arithmetic gives
    - out: 8 values in 2 rows lie beyond what any rounding explains; ...
    """
    __tracebackhide__ = True
    verdict = judge(*arguments, **keywords)
    if verdict.passed is not True:
        raise AssertionError(message_of(verdict))


def message_of(verdict: Verdict) -> str:
    """A verdict that did not pass, for people: the verdict, why, the diagnosis, what was asked and assumed."""
    if verdict.judgeable:
        said = f"attention is WRONG: not what correct {verdict.precision} arithmetic gives"
    else:
        said = f"attention is NOT JUDGEABLE in {verdict.precision}: no fault found, and not all could be judged"
    diagnosis = [f"diagnosis: {cause}" for cause in verdict.diagnosis]
    lines = [f"- {line}" for line in (*verdict.reasons, *diagnosis)]
    judged = f"judged: {verdict.rows_judged:,} of {verdict.rows:,} rows (batch, position, head)"
    filled = [textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
              for line in (*lines, *sentences(verdict.asked), judged)]  # fmt: skip
    return "\n".join([said, *filled])
