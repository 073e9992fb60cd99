"""Each line of the card is right, or says that it cannot be told, for arithmetic that is drawn or broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import masks, results, scores, tiles, weights
from cpjax.fingerprint.card import all_probes, card_of
from cpjax.fingerprint.kernels import DTYPES, emulator
from cpjax.fingerprint.probe import UNTOLD, Answer, Kernel, Probe, padded, toward_zero
from cpjax.trial.emulators import PROFILES, dtype_of

NAMES = [name for name in PROFILES if name not in ("float64", "fia_fp16", "fia_bf16")]
"""fia: one device has nothing to merge, and what is carried from merge to merge is not asked."""


def lines(kernel: Kernel, room, dtype: str = "float16") -> dict[str, tuple[str, str]]:
    """Line → (code, value), of one room."""
    fmt = FORMATS[dtype]
    asked = room.probes(fmt)
    with np.errstate(all="ignore"):
        answers = {name: kernel(one) for name, one in asked.items()}
    return {line.name: (line.code, line.value) for line in room.read(fmt, asked, answers)}


def code(kernel: Kernel, room, name: str, dtype: str = "float16") -> str:
    return lines(kernel, room, dtype)[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_profile_of_an_emulator_is_found(name):
    card = card_of(emulator(name, tile=256), dtype_of(name))
    assert not card.failures
    assert card.profile is not None
    assert card.profile.name == name


def drawn(seed: int) -> tuple[str, dict]:
    """A profile, and what an implementation of it is free to choose."""
    rng = np.random.default_rng(seed)
    name = str(rng.choice(NAMES))
    half = PROFILES[name].score != "float32"
    return name, {
        "tile": int(rng.choice([16, 48, 64, 128, 256, 512])),
        "summation": str(rng.choice(["blas", "pairwise"])),
        "base_two": not half and bool(rng.random() < 0.5),
    }


def truth(name: str, changes: dict) -> dict[str, str]:
    """Line → code, as far as the arithmetic says it."""
    a = replace(PROFILES[name], **changes)
    half = dtype_of(name)
    normalised = "normalised " if a.is_normalised else ""
    return {
        "scores": a.score,
        "scale": "query" if a.query else "rounded" if (a.scale or a.score) != "float32" else "score",
        "p as the factor of v": normalised + a.probability,
        "p in the row sum": "rounded" if a.summed else "float32",
        "key tile": "whole" if a.is_normalised else str(a.tile),
        "splits of the keys": "1",
        "base of exp": "two" if a.base_two else "e",
        "lse": "natural",
        "order within q·k": "in pairs, halves added to halves" if a.summation == "pairwise" else "",
        "rounding of out": "nearest even" if half != "float32" else "",
        "what hides a key": "-inf",
        "heads that share keys": "neighbours:",
        "from call to call": "same",
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_every_line_is_right_or_not_told(seed):
    name, changes = drawn(seed)
    card = card_of(emulator(name, **changes), dtype_of(name))
    wrong = {}
    for line_name, expected in truth(name, changes).items():
        line = card.line(line_name)
        if expected and line.code and line.code != expected:
            wrong[line_name] = (line.value, expected)
    assert not wrong
    told = [line for line in card.lines if UNTOLD not in line.value]
    assert len(told) >= 21, [line for line in card.lines if UNTOLD in line.value]


def plain(
    exp: Callable = np.exp,
    hidden: Callable = lambda score, seen: np.where(seen, score, -np.inf),
    finish: Callable = lambda x: FORMATS["float16"].round(x),
    lse: Callable | None = lambda m, total: m + np.log(total),
    head: Callable = lambda h, group, kv_heads: h // group,
    cap: float | None = None,
    splits: int = 1,
) -> Kernel:
    """Attention by a plain NumPy loop, with a part replaced; FP16 probabilities, one maximum for each split."""
    half = FORMATS["float16"].round

    def kernel(asked: Probe) -> Answer:
        query, key, value = (x.astype(np.float16).astype(np.float32) for x in asked[:3])
        batch, length, heads, _ = query.shape
        kv_heads, keys = key.shape[2], key.shape[1]
        out = np.zeros((batch, length, heads, value.shape[3]))
        sums = np.zeros((batch, length, heads))
        seen = np.tri(length, keys, dtype=bool) if asked.is_causal else np.ones((length, keys), bool)
        for b, h in np.ndindex(batch, heads):
            g = head(h, heads // kv_heads, kv_heads)
            score = (query[b, :, h] @ key[b, :, g].T) * np.float32(asked.scale)
            score = score if cap is None else np.clip(score, -cap, cap)
            score = hidden(score, seen)
            top = score.max(axis=1, keepdims=True)
            total, part = np.zeros((length, 1)), np.zeros((length, value.shape[3]))
            for some in np.array_split(np.arange(keys), splits):
                m = score[:, some].max(axis=1, keepdims=True)
                p = exp(score[:, some] - np.where(np.isinf(m), 0, m))
                weight = np.exp(m - top)
                total += weight * p.sum(axis=1, keepdims=True)
                part += weight * (half(p) @ value[b, some, g].astype(np.float64))
            out[b, :, h] = finish(part / total)
            if lse is not None:
                sums[b, :, h] = lse(top, total)[:, 0]
        return Answer(out, sums if lse is not None else None)

    return kernel


def test_the_plain_loop_is_read_as_what_it_is():
    found = lines(plain(), weights)
    assert found["p as the factor of v"][0] == "float16"
    assert found["p in the row sum"][0] == "float32"
    assert found["p below 2^-14"][0] == "subnormal"
    assert code(plain(), tiles, "key tile") == "whole"


@pytest.mark.parametrize("power", [-12, -14, -16])
@pytest.mark.parametrize("with_lse", [True, False])
def test_an_exponential_that_errs(power, with_lse):
    """The error is read off lse, and without lse off the rounding of p; to a factor of four."""

    def off(x):
        return np.exp(x) * (1 + 2.0**power * np.sin(40 * x))

    kernel = plain(exp=off) if with_lse else plain(exp=off, lse=None)
    size, said = lines(kernel, weights)["error of exp"]
    if power == -12 and not with_lse:  # as large as half a step of FP16: it may hide what p is rounded to
        assert size or UNTOLD in said
        return
    assert power - 2 <= np.log2(float(size)) <= power + 2, said


@pytest.mark.parametrize("count", [2, 4, 8])
def test_splits_of_the_keys(count):
    found = lines(plain(splits=count), tiles)
    assert found["splits of the keys"][0] == str(count)


def test_a_mask_of_a_finite_number():
    def replaced(score, seen):
        return np.where(seen, score, np.float32(-10_000))

    found, said = lines(plain(hidden=replaced), masks)["what hides a key"]
    assert -16384 <= float(found) <= -8192, said


def test_a_mask_that_is_added():
    def added(score, seen):
        return score + np.where(seen, 0, np.float32(-1_000)).astype(np.float32)

    assert code(plain(hidden=added), masks, "what hides a key") != "-inf"


def test_heads_by_the_remainder():
    kernel = plain(head=lambda h, group, kv_heads: h % kv_heads)
    assert code(kernel, masks, "heads that share keys") == "h"
    assert "mod" in lines(kernel, masks)["heads that share keys"][1]


def test_a_mask_that_is_off_by_one_is_not_called_causal():
    def shifted(score, seen):
        return np.where(np.roll(seen, 1, axis=1) | np.eye(*seen.shape, dtype=bool), score, -np.inf)

    assert code(plain(hidden=shifted), masks, "causal mask") == ""


def aligned(first: bool, blind: str) -> Kernel:
    """A causal mask of T queries and S keys at the first tokens, or at the last; what a row gives that sees nothing."""

    def hidden(score, seen):
        length, keys = score.shape
        seen = np.tri(length, keys, 0 if first else keys - length, dtype=bool) if not seen.all() else seen
        return np.where(seen, score, np.float32(-1e30) if blind == "mean" else -np.inf)

    fill = {"zeros": 0.0, "five": 5.0}.get(blind, np.nan)
    kernel = plain(hidden=hidden, finish=lambda x: FORMATS["float16"].round(np.where(np.isnan(x), fill, x)))

    def quiet(asked: Probe) -> Answer:
        with np.errstate(all="ignore"):
            return kernel(asked)

    return quiet


@pytest.mark.parametrize("blind", ["zeros", "nan", "mean"])
def test_where_a_mask_of_other_lengths_begins(blind):
    found = lines(aligned(False, blind), masks)
    assert found["causal mask, T < S"][0] == "bottom-right"
    assert found["rows that see no key"][0] == blind
    assert found["causal mask"][0] == "causal"
    assert lines(aligned(True, blind), masks)["causal mask, T < S"][0] == "top-left"


def test_rows_that_see_no_key_are_not_guessed():
    assert code(aligned(False, "five"), masks, "rows that see no key") == ""
    assert code(aligned(True, "zeros"), masks, "rows that see no key") == ""

    def shifted(score, seen):
        return np.where(seen & ~np.tri(*seen.shape, -2, dtype=bool), score, -np.inf)

    found = lines(plain(hidden=shifted), masks)
    assert (found["causal mask, T < S"][0], found["rows that see no key"][0]) == ("", "")


def test_out_cut_off():
    assert code(plain(finish=lambda x: toward_zero(x, FORMATS["float16"])), results, "rounding of out") == "toward zero"


@pytest.mark.parametrize(
    ("convention", "first"),
    [
        (lambda m, total: (m + np.log(total)) / np.log(2), "base"),
        (lambda m, total: m + np.log2(total), "max"),
        (lambda m, total: m, "the"),
        (lambda m, total: FORMATS["float16"].round(m + np.log(total)), "natural"),
    ],
)
def test_what_lse_is(convention, first):
    found = lines(plain(lse=convention), results)
    assert found["lse"][0] == first
    assert ("float16" in found["lse"][1]) == (first == "natural")


def test_scores_that_are_cut_off():
    assert code(plain(cap=60_000.0), scores, "scores beyond 65,504") == "clamped"


def test_the_range_of_half_scores():
    assert code(emulator("eager_fp16"), scores, "scores beyond 65,504") == "no"


@pytest.mark.slow
def test_a_kernel_that_fails_has_a_card_without_values():
    def broken(asked: Probe) -> Answer:
        raise RuntimeError("no kernel image")

    def nan(asked: Probe) -> Answer:
        batch, length, heads, _ = asked.query.shape
        return Answer(np.full((batch, length, heads, asked.value.shape[3]), np.nan), None)

    for kernel in (broken, nan):
        card = card_of(kernel, "float16")
        assert card.profile is None
        allowed = {"from call to call", "in another batch", "a row alone", "lse", "scores beyond 65,504"}
        allowed |= {"NaN in a hidden value", "NaN in a hidden key"}
        told = {line.name for line in card.lines if UNTOLD not in line.value}
        assert told <= (allowed if kernel is nan else set())
    assert "no kernel image" in card_of(broken, "float16").failures["scores"]


def test_bits_that_change():
    rng = np.random.default_rng(0)

    def noisy(asked: Probe) -> Answer:
        answer = emulator("flash_fp16")(asked)
        return answer._replace(out=answer.out + rng.choice([0.0, 2.0**-24], answer.out.shape))

    from cpjax.fingerprint import same

    assert code(noisy, same, "from call to call") == "differ"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_probes_are_exact_in_their_format_and_survive_other_head_dims(dtype):
    for asked in all_probes(dtype).values():
        for x in asked[:3]:
            kept = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
            np.testing.assert_array_equal(kept, x)
        wider = padded(asked, (192, 128))
        assert wider.query.shape[3] == wider.key.shape[3] == 192
        assert wider.value.shape[3] == 128
        np.testing.assert_array_equal(wider.key[..., :64], asked.key)
        assert not wider.key[..., 64:].any()
