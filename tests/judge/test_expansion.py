"""Keys and values that a backend made of a latent: what float32 sums explain is right, another product is named."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from products import exact, terms
from strategies import examples

from cpjax.crosscheck.files.latent import Latent, expanded
from cpjax.crosscheck.judging.expansion import check_expanded


def latent(rng, width, batch=2, tokens=6, heads=3, dims=(5, 2, 4)) -> Latent:
    nope, rope, value_dim = dims
    shapes = (batch, tokens, width), (batch, tokens, rope), (width, heads, nope), (width, heads, value_dim)
    return Latent(*(rng.normal(size=x).astype(np.float16) for x in shapes))


def made(x: Latent, product) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values by `product(c_kv, weight) -> float16`."""
    key, value = product(x.c_kv, x.w_uk), product(x.c_kv, x.w_uv)
    rope = np.broadcast_to(x.k_rope[:, :, None], (*key.shape[:3], x.k_rope.shape[2]))
    return np.concatenate([key, rope], axis=3), value


@examples(0.5)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 7, 64, 300)), st.sampled_from(("forwards", "shuffled", "pairs"))
)
def test_float32_sums_in_any_order_are_right(seed, width, how):
    rng = np.random.default_rng(seed)
    x = latent(rng, width)

    def product(c_kv, weight):
        summands = terms(c_kv, weight)
        if how == "shuffled":
            summands = rng.permutation(summands)
        if how == "pairs":
            return summands.sum(axis=0, dtype=np.float32).astype(np.float16)
        total = np.zeros(summands.shape[1:], np.float32)
        for summand in summands:
            total += summand
        return total.astype(np.float16)

    found = check_expanded(x, *made(x, product), np.ones((2, 6), bool))
    assert found.reasons == []
    assert found.differing < 0.1


def truncated(x):
    """Towards zero, to float16."""
    near = x.astype(np.float16)
    return np.where(np.abs(near.astype(x.dtype)) > np.abs(x), np.nextafter(near, np.float16(0)), near).astype(
        np.float16
    )


def in_float16(c_kv, weight):
    total = np.zeros(terms(c_kv, weight).shape[1:], np.float16)
    for summand in terms(c_kv, weight):
        total = (total + summand.astype(np.float16)).astype(np.float16)
    return total


def as_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


WRONG_PRODUCTS = {
    "truncated": lambda c, w: truncated(exact(c, w)),
    "summed in float16": in_float16,
    "weights in bfloat16": lambda c, w: exact(c, as_bfloat16(w)).astype(np.float16),
    "result in bfloat16": lambda c, w: as_bfloat16(exact(c, w)).astype(np.float16),
    "one term lost": lambda c, w: exact(c[..., 1:], w[1:]).astype(np.float16),
    "heads exchanged": lambda c, w: exact(c, w[:, ::-1]).astype(np.float16),
    "tokens exchanged": lambda c, w: exact(c[:, ::-1], w).astype(np.float16),
    "of the batch's other row": lambda c, w: exact(c[::-1], w).astype(np.float16),
    "one number lost": lambda c, w: _with(exact(c, w).astype(np.float16), np.float16(0)),
    "one NaN": lambda c, w: _with(exact(c, w).astype(np.float16), np.float16(np.nan)),
}


def _with(x, number):
    x[1, 3, 2, 1] = number
    return x


@pytest.mark.parametrize("fault", WRONG_PRODUCTS)
@pytest.mark.parametrize("width", [64, 512])
@examples(0.1)
@given(seed=st.integers(0, 2**32 - 1))
def test_another_product_is_named(fault, width, seed):
    x = latent(np.random.default_rng(seed), width, tokens=20, heads=3, dims=(32, 2, 32))
    found = check_expanded(x, *made(x, WRONG_PRODUCTS[fault]), np.ones((2, 20), bool))
    assert [reason.split(":")[0] for reason in found.reasons] == ["key", "value"]
    assert "c_kv·W_UK" in found.reasons[0]
    if fault in ("one number lost", "one NaN"):
        assert "1 of 3,840 numbers" in found.reasons[0]
        assert "batch 1, token 3, head 2, dim 1: " in found.reasons[0]


def others(x: Latent, product: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each product the other FP16 number that float32 sums could make of it, where there is one."""
    exact_product, near = exact(x.c_kv, weight), product
    room = (weight.shape[0] - 1) * 2.0**-24 * np.abs(terms(x.c_kv, weight)).astype(np.float64).sum(axis=0)
    low, high = ((exact_product + sign * room).astype(np.float16) for sign in (-1, 1))
    return np.where(low != near, low, high)


@pytest.mark.parametrize("where", ["in all", "of head 1", "of tokens 512 to 1023"])
def test_too_many_neighbours_are_named(where):
    """Each of them alone is possible, so many are not: in one head, in some tokens, everywhere."""
    x = latent(np.random.default_rng(3), 256, batch=1, tokens=1200, heads=3, dims=(8, 2, 8))
    key, value = expanded(x)
    wrong = others(x, value, x.w_uv)
    share = (wrong != value).mean()
    assert 0.5 < share < 1
    at = {"in all": (), "of head 1": np.s_[:, :, 1], "of tokens 512 to 1023": np.s_[:, 512:1024]}[where]
    value[at] = wrong[at]
    (reason,) = check_expanded(x, key, value, np.ones((1, 1200), bool)).reasons
    assert reason.startswith("value: ")
    assert f" numbers {where} are not the FP16 number next to the product, where float32 sums explain " in reason


def test_as_many_neighbours_as_sums_explain_are_right():
    """The limit is Σq; what lies nearest to a middle comes out otherwise first."""
    x = latent(np.random.default_rng(3), 256, batch=1, tokens=300, heads=1, dims=(8, 2, 8))
    key, value = expanded(x)
    wrong, product = others(x, value, x.w_uv), exact(x.c_kv, x.w_uv)
    size = np.abs(terms(x.c_kv, x.w_uv)).astype(np.float64).sum(axis=0)
    spacing = np.spacing(np.abs(value)).astype(np.float64)
    explained = np.minimum(1, 16 * 2.0**-24 * size / spacing).sum()
    nearest = np.argsort(np.abs(np.abs(product - value) / spacing - 0.5), axis=None)
    for share, count in ((0.9, 0), (1.6, 1)):
        some = value.copy()
        at = np.unravel_index(nearest[: int(share * explained)], value.shape)
        some[at] = wrong[at]
        assert len(check_expanded(x, key, some, np.ones((1, 300), bool)).reasons) == count


def test_one_term_is_exact_and_two_are_off_by_their_last_place():
    a, b = np.float16(1 + 2.0**-5), np.float16(1 + 2.0**-6)  # a·b = 1 + 2^-5 + 2^-6 + 2^-11: in the middle
    product = float(a) * float(b)
    even, odd = np.float16(product), np.nextafter(np.float16(product), np.float16(2))
    single = Latent(np.full((1, 1, 1), a), np.zeros((1, 1, 1), np.float16), *(np.full((1, 1, 1), b),) * 2)
    rope = np.zeros((1, 1, 1, 1), np.float16)

    def reasons(x, number):
        given = np.full((1, 1, 1, 1), number)
        return check_expanded(x, np.concatenate([given, rope], axis=3), given, np.ones((1, 1), bool)).reasons

    assert reasons(single, even) == []
    assert len(reasons(single, odd)) == 2  # no sum, so nothing can be off
    # A second term takes the sum below the middle: by less than a last place of float32, or by more.
    for power, count in ((-24, 0), (-22, 2)):
        c_kv = np.array([[[a, 2.0**-12]]], np.float16)
        w = np.array([b, -(2.0 ** (power + 12))], np.float16).reshape(2, 1, 1)
        assert len(reasons(Latent(c_kv, single.k_rope, w, w), odd)) == count


def test_equal_tokens_differ_together():
    """One sum that float32 gets otherwise is got otherwise in every token that has the same latent: that is one."""
    rng = np.random.default_rng(3)
    row = latent(rng, 256, batch=1, tokens=1, heads=1, dims=(8, 2, 8))
    x = replace(row, c_kv=np.repeat(row.c_kv, 2000, axis=1), k_rope=np.repeat(row.k_rope, 2000, axis=1))
    key, value = expanded(x)
    wrong = others(x, value, x.w_uv)
    assert (wrong != value)[..., :6].sum() > 4000
    value[..., :6] = wrong[..., :6]
    assert check_expanded(x, key, value, np.ones((1, 2000), bool)).reasons == []


def test_a_rotary_part_of_another_token_is_named_and_pads_are_not_looked_at():
    x = latent(np.random.default_rng(0), 16)
    key, value = expanded(x)
    assert check_expanded(x, key, value, np.ones((2, 6), bool)) == ([], 0.0)
    moved = key.copy()
    moved[1, 2, 1, 5:] = key[1, 3, 1, 5:]
    found = check_expanded(x, moved, value, np.ones((2, 6), bool))
    assert found.reasons == ["key: the last 2 numbers of 1 key are not k_rope, the first at batch 1, token 2, head 1"]
    seen = np.ones((2, 6), bool)
    seen[1, 2] = False
    value[1, 2] = np.nan
    for hidden in (np.nan, np.inf):
        x.c_kv[1, 2], x.k_rope[1, 2] = hidden, hidden
        assert check_expanded(x, moved, value, seen) == ([], 0.0)
        assert np.isfinite(expanded(x)[1][seen]).all()
