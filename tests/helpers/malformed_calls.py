"""Malformed calls of `judge`, drawn at random: `python -m tests.helpers.malformed_calls EXAMPLES`.

Prints how many calls were refused and how many judged; anything but a verdict, ValueError or TypeError is a failure.
"""

import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpjax.crosscheck import judge
from cpjax.errors import InputError
from cpjax.precision import Precision

LENGTH = 16
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((1, LENGTH, 2, 8)).astype(np.float32) for _ in range(3))

REFUSED = [
    ({"is_causal": "no"}, "is_causal is 'no'"),
    ({"is_causal": None}, "is_causal is None"),
    ({"is_causal": 1}, "is_causal is 1"),
    ({"window": 1.5}, "window is 1.5"),
    ({"window": float("nan")}, "window is nan"),
    ({"window": True}, "window is True"),
    ({"window": 0}, "it must be at least 1"),
    ({"window": 2**40}, "below 2\\^31"),
    ({"cp": True}, "cp is True"),
    ({"cp": 2**16}, "cp is 65536"),
    ({"scale": 10**400}, "scale is no number that float64 holds"),
    ({"scale": float("nan")}, "scale is nan"),
    ({"scale": "0.5"}, "scale is '0.5'"),
    ({"scale": True}, "scale is True"),
    ({"scale": 1e6, "precision": "ring_mla_fp16"}, "which float16 does not hold"),
    ({"segment_ids": (np.zeros((1, LENGTH), int),)}, "a tuple of 1"),
    ({"precision": Precision("mine", "float32", "float7", "float16", "float16")}, "float7"),
    ({"precision": "flash_fp15"}, "unknown precision"),
    ({"q_positions": np.zeros((1, LENGTH))}, "must be whole numbers"),
]
"""Words of a call, and what the error says."""

DTYPES = [np.uint8, np.uint64, np.int32, bool, "U2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
OBJECTS = [torch.zeros(1, LENGTH, 2, 8), torch.zeros(1, LENGTH), torch.empty(3, device="meta"), Fraction(1, 3)]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 40), st.floats(), st.text(max_size=4),
    st.fractions(), st.complex_numbers(), st.binary(max_size=4), st.just(10**400), st.just(object()),
    st.lists(st.integers(-2, 9), max_size=3), st.lists(st.lists(st.floats(), max_size=3), max_size=3),
    st.builds(np.full, st.sampled_from([(1, LENGTH), (LENGTH,), (1, LENGTH, 2, 8), (1, 3, 2, 8), (0, 1, 1, 1), ()]),
              st.sampled_from([0, 1, -1, 300, 0.5, np.nan, np.inf]),
              st.sampled_from([np.float16, np.float32, np.float64, np.complex64, object])),
    st.builds(lambda shape, dtype: np.ones(shape, dtype),
              st.sampled_from([(1, LENGTH), (LENGTH,), (1, LENGTH, 2, 8), (1, LENGTH, 2, 7), (2, LENGTH, 2, 8), ()]),
              st.sampled_from(DTYPES)),
    st.sampled_from(OBJECTS),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)  # fmt: skip
WORDS = ("query", "key", "value", "out", "lse", "scale", "is_causal", "q_positions", "kv_positions", "segment_ids",
         "window", "partition", "cp", "layout", "precision", "order", "seed")  # fmt: skip


def refusals():
    """Each of the table is refused with its words."""
    for words, says in REFUSED:
        with pytest.raises(InputError, match=says):
            judge(QUERY, KEY, VALUE, VALUE, **words)


def main(examples: int) -> None:
    """The table, and then calls at random."""
    refusals()
    ends = {"refused": 0, "judged": 0}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.dictionaries(st.sampled_from(WORDS), ODD, min_size=1, max_size=3))
    def calls(words):
        call = {"query": QUERY, "key": KEY, "value": VALUE, "out": VALUE} | words
        try:
            verdict = judge(**call)
        except (ValueError, TypeError):  # InputError is a ValueError
            ends["refused"] += 1
            return
        ends["judged"] += 1
        if (
            verdict.passed
        ):  # VALUE is no attention, and nothing drawn is, but for the mean of values that are one number
            numbers = np.concatenate([np.asarray(call[name]).ravel() for name in ("value", "out")])
            assert call.get("window") == 1 or len(np.unique(numbers)) == 1
        else:
            assert verdict.reasons

    calls()
    print(ends["refused"], ends["judged"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
