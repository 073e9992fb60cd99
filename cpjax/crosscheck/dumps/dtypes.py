"""In which precisions a dump may have been computed, from the dtypes of its files, the strictest first."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.precision import PROFILE_OF, PROFILES, Precision


class Candidate(NamedTuple):
    """A precision, and the format to which the query is rounded first, if it is."""

    precision: Precision
    query: str | None = None

    @property
    def name(self) -> str:
        """In a remark."""
        return self.precision.name + (f", of the query rounded to {self.query}" if self.query else "")


def candidates(
    query: np.dtype,
    key: np.dtype,
    value: np.dtype,
    out: np.ndarray,
    named: Precision | None,
    inputs: tuple[np.ndarray, ...] = (),
) -> tuple[list[Candidate], str | None]:
    """The precisions to try, and a sentence where the dtypes are not those of one profile.

    Args:
      query, key, value: dtypes in the files.
      out: the result.
      named: the precision that was said, or None.
      inputs: query, key and value. NumPy has no BF16, so such tensors are often dumped as float32: where these and out
        hold numbers of a narrower format only, they are tried as such, too.

    >>> found, _ = candidates(np.dtype("float32"), *[np.dtype("float16")] * 2, np.zeros(1, np.float32), None)
    >>> [one.name for one in found][-1]
    'float16 probabilities with float32 out, of the query rounded to float16'
    """
    names = [x.name for x in (query, key, value)]
    store = out.dtype.name
    if named is not None:
        if not _holds(out, named.out) and store in FORMATS and FORMATS[store].digits > FORMATS[named.out].digits:
            wider = replace(named, name=f"{named.name} with {store} out", out=store, carry=store)
            return [Candidate(wider)], f"precision: out is {store}, so {named.name} is taken with out stored in {store}"
        return [Candidate(named)], None
    narrow = PROFILE_OF.get(names[0])
    if len(set(names)) == 1 and narrow is not None and (store == names[0] or _holds(out, names[0])):
        more = ["ring_mla_fp16"] if names[0] == store == "float16" else []
        # BF16 numbers of usual size are FP16 numbers, too; an out of FP16 has others.
        fmt = next((x for x in ("bfloat16", "float16") if inputs and _are_widened((*inputs, out), x)), None)
        if fmt is None:
            return [Candidate(PROFILES[name]) for name in (narrow, *more)], None
        more += [PROFILE_OF[fmt], *(["ring_mla_fp16"] if fmt == "float16" else [])]
        says = f"dtypes: query, key, value and out are {store} and hold {fmt} numbers only; tried as such, too"
        return [Candidate(PROFILES[name]) for name in (narrow, *more)], says
    says = f"dtypes: query {names[0]}, key {names[1]}, value {names[2]}, out {store}; exact from the numbers given"
    low = [name for name in (names[2], names[1], names[0], store) if name in ("float16", "bfloat16")]
    stored = store if store in FORMATS else "float32"
    found = [_mixed("float64" if stored == "float64" else "float32", stored)]
    for fmt in dict.fromkeys(low):
        found.append(_mixed(fmt, stored))
        # llama.cpp rounds a float32 query to the cache's format before it multiplies.
        if fmt == names[1] and names[0] in ("float32", "float64"):
            found.append(Candidate(_mixed(fmt, stored).precision, fmt))
    if any(name.startswith("float8") for name in names):
        says += (
            "; scale times FP8 number is taken without rounding, and probabilities in FP8 are not among the precisions"
        )
    return found, says


def with_stored_lse(candidate: Candidate, fmt: str) -> Candidate:
    """The same where lse is handed over in half precision: rounded once, as its file says."""
    named = replace(candidate.precision, name=f"{candidate.precision.name} with {fmt} lse", lse=fmt)
    return candidate._replace(precision=named)


def _mixed(probability: str, out: str) -> Candidate:
    """float32 scores and sums, probabilities rounded to one format, out stored in another."""
    compute = "float64" if probability == "float64" else "float32"
    name = f"{probability} probabilities with {out} out"
    return Candidate(Precision(name, compute, compute, probability, out))


def _are_widened(arrays: tuple[np.ndarray, ...], fmt: str) -> bool:
    """Whether arrays of a wider format hold numbers of this one only."""
    if any(FORMATS[x.dtype.name].digits <= FORMATS[fmt].digits for x in arrays):
        return False
    return all(_holds(x, fmt) for x in arrays)


def _holds(out: np.ndarray, fmt: str) -> bool:
    """Whether all finite numbers are numbers of the format."""
    if out.dtype.name == fmt:
        return True
    finite = out[np.isfinite(out)]
    with np.errstate(over="ignore"):
        return bool((finite.astype(FORMATS[fmt].dtype).astype(out.dtype) == finite).all())
