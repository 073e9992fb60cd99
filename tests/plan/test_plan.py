"""Laws of the cost model: what is counted is what a mask shows, what is faster takes no longer, what fits fits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpjax.errors import InputError
from cpjax.mask import Mask, tokens, visible
from cpjax.partition import SEQUENCES
from cpjax.plan.constants import Constants, frozen
from cpjax.plan.facts import shipped
from cpjax.plan.fit import fit, point
from cpjax.plan.gain import SHORTEST, pays_from, plan
from cpjax.plan.gain import settings as settings_of
from cpjax.plan.hardware import devices
from cpjax.plan.memory import USABLE, fits, longest_prompt, memory, weight_bytes
from cpjax.plan.model import models, shape_of
from cpjax.plan.published import predicted, publications, rows
from cpjax.plan.report import published_markdown, why
from cpjax.plan.setting import EXCHANGES, Setting
from cpjax.plan.time import attention_layer, block_seconds, ideal_layer, predict
from cpjax.plan.transfers import by_step, exposed_seconds, received_bytes, reduce_seconds, tokens_met
from cpjax.plan.work import prefix_tokens, visible_pairs

CONSTANTS = frozen()
SIZES = st.sampled_from([1, 2, 3, 4, 8])
DEVICES = st.sampled_from(list(devices().values()))
MODELS = st.sampled_from(list(models().values()))
DEEPSEEK, LLAMA = models()["DeepSeek-R1"], models()["Llama-3.1-405B"]
H100 = devices()["h100"]


few = settings(max_examples=25)


@st.composite
def drawn(draw, cp=SIZES):
    """A setting, whatever it costs."""
    return Setting(
        draw(MODELS), draw(DEVICES), draw(cp), draw(st.sampled_from([1, 2, 8])),
        partition=draw(st.sampled_from(list(SEQUENCES))), exchange=draw(st.sampled_from(EXCHANGES)),
        chunk=draw(st.sampled_from([None, 1000])),
    )  # fmt: skip


LENGTHS = st.integers(1, 5000)
PREFIXES = st.sampled_from([0, 1, 777, 100_000])

# Work ----------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(list(SEQUENCES)), SIZES, st.integers(1, 3), st.integers(0, 9))
def test_pairs_are_those_of_the_mask(name, cp, times, prefix):
    """Rank by rank and source by source, against the mask itself, drawn out in booleans."""
    one = SEQUENCES[name](cp)
    length = one.chunk_count * times
    new = one.order(length).reshape(cp, -1)
    old = np.split(np.arange(prefix), np.cumsum(prefix_tokens(prefix, cp))[:-1])
    seen = visible(Mask(), tokens(1, length, start=prefix), tokens(1, prefix + length))[0]
    expected = [
        [seen[np.ix_(new[rank], np.concatenate([old[source], prefix + new[source]]))].sum() for source in range(cp)]
        for rank in range(cp)
    ]
    found = visible_pairs(one, length, prefix)
    np.testing.assert_array_equal(found, expected)
    assert found.sum() == length * (length + 1) // 2 + length * prefix


def test_zigzag_shares_evenly_and_contiguous_does_not():
    even, uneven = (visible_pairs(SEQUENCES[name](4), 64).sum(axis=1) for name in ("zigzag", "contiguous"))
    assert len(set(even)) == 1
    assert list(uneven) == sorted(set(uneven))
    ring = {name: predict(Setting(LLAMA, H100, 4, partition=name), CONSTANTS, 65536) for name in SEQUENCES}
    assert ring["zigzag"].balance == pytest.approx(1)
    assert ring["contiguous"].balance == pytest.approx(4 / 7, rel=1e-3)
    assert ring["contiguous"].attention > 1.7 * ring["zigzag"].attention


@given(SIZES)
def test_a_step_meets_the_rank_that_far_behind(cp):
    source = by_step(np.tile(np.arange(cp), (cp, 1)))
    assert all(source[rank, step] == (rank - step) % cp for rank in range(cp) for step in range(cp))


# Models --------------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_names():
    """What their names and papers say, to 2 %: 671, 405, 235 and 397 billion; of a token 37 (with ends), 22, 17."""
    billions = {name: (shape.total / 1e9, (shape.active + shape.ends) / 1e9) for name, shape in models().items()}
    expected = {
        "DeepSeek-R1": (671, 37.5), "Llama-3.1-405B": (405.8, 405.8), "Llama-3.1-8B": (8.03, 8.03),
        "Qwen3-235B-A22B": (235, 22.2), "Qwen3.5-397B-A17B": (397, 17),
    }  # fmt: skip
    for name, numbers in expected.items():
        assert billions[name] == pytest.approx(numbers, rel=0.02), name


def test_experts_make_up_the_model_whose_width_is_assumed():
    assert models()["Qwen3.5-397B-A17B"].routed / 397e9 == pytest.approx(1, abs=0.03)


def test_parameters_are_those_of_the_checkpoint():
    """Against the shapes of a DeepSeek checkpoint's own tensors; norms and biases, vectors, are left out."""
    from cpjax.deepseek.config import SMALL
    from cpjax.deepseek.names import shapes

    numbers = sum(int(np.prod(tensor)) for tensor in shapes(SMALL).values() if len(tensor) > 1)
    assert shape_of(SMALL).total == numbers


# Transfers -----------------------------------------------------------------------------------------------------------


@few
@given(drawn(), LENGTHS, PREFIXES)
def test_bytes_are_all_keys_but_ones_own(setting, length, prefix):
    """(cp − 1)/cp · tokens · bytes of a token: 576 · 2 of a latent; to the one token that cp cuts unevenly."""
    model, cp = setting.model, setting.cp
    numbers = 576 if model.latent else max(1, -(-model.kv_heads // setting.tp)) * 2 * model.key_dim
    each = numbers * model.cache_bits / 8
    found = received_bytes(setting, length, prefix)
    share = (cp - 1) / cp * (setting.padded(length) + prefix) * each
    assert np.abs(found - share).max() <= each
    assert found.sum() == pytest.approx((cp - 1) * (setting.padded(length) + prefix) * each)
    assert setting.padded(length) - length < 2 * cp


@few
@given(drawn(st.just(1)), LENGTHS, PREFIXES)
def test_one_rank_sends_nothing(setting, length, prefix):
    found = predict(setting, CONSTANTS, length, prefix)
    assert (found.received, found.exposed, found.balance) == (0, 0, 1)
    alone = predict(replace(setting, exchange="gather", partition="zigzag", tp=1), CONSTANTS, length, prefix)
    assert alone.exposed == 0


@few
@given(drawn(), LENGTHS, PREFIXES)
def test_exposed_is_what_the_next_block_is_late(setting, length, prefix):
    """The formula of the page, step by step in a plain loop."""
    blocks = block_seconds(setting, CONSTANTS, length, prefix)
    held = tokens_met(setting, length, prefix) * setting.model.cache_bytes(setting.tp)
    cp, found = setting.cp, exposed_seconds(setting, blocks, length, prefix)
    for rank in range(cp):
        if setting.exchange == "ring":
            rate, latency = setting.device.ring(setting.cards)
            late = sum(
                max(0.0, held[(rank - step - 1) % cp] / rate + latency - blocks[rank, step]) for step in range(cp - 1)
            )
        else:
            rate, latency = setting.device.collective(setting.cards)
            late = (held.sum() - held[rank]) / rate + (cp - 1) * latency
        assert found[rank] == pytest.approx(late, rel=1e-12, abs=1e-15)


@few
@given(drawn(), LENGTHS)
def test_sums_over_tp_are_those_of_a_ring(setting, length):
    setting = replace(setting, model=LLAMA)
    tp, rows = setting.tp, setting.padded(length) / setting.cp
    rate, latency = setting.device.collective(tp)
    each = 2 * (tp - 1) * (rows / tp * 2 * 16384 / rate + latency)
    assert reduce_seconds(setting, length) == pytest.approx(2 * 126 * each)


# Time ----------------------------------------------------------------------------------------------------------------

RATES = [
    *("tflops_16bit", "tflops_8bit", "memory_gb_s", "ring_link_gb_s", "all_links_gb_s", "network_gb_s"),
    *("latency_us", "network_latency_us"),
]


@few
@given(drawn(), LENGTHS, PREFIXES, st.sampled_from(RATES), st.sampled_from([1.01, 2.0, 100.0]))
def test_nothing_faster_takes_longer(setting, length, prefix, rate, factor):
    value = getattr(setting.device, rate) or setting.device.tflops_16bit
    better = value / factor if rate.endswith("us") else value * factor
    fast = replace(setting, device=setting.device.model_copy(update={rate: better}))
    slow = predict(setting, CONSTANTS, length, prefix).seconds
    assert predict(fast, CONSTANTS, length, prefix).seconds <= slow * (1 + 1e-12)


@few
@given(drawn(), LENGTHS, PREFIXES)
def test_all_twice_as_fast_takes_half_the_time(setting, length, prefix):
    """So nothing in a time is without a rate: a wrong unit anywhere would show."""
    device = setting.device
    twice = {
        rate: getattr(device, rate) * (0.5 if rate.endswith("us") else 2) for rate in RATES if getattr(device, rate)
    }
    fast = replace(setting, device=device.model_copy(update=twice))
    slow, found = (predict(one, CONSTANTS, length, prefix).seconds for one in (setting, fast))
    assert found == pytest.approx(slow / 2)


@few
@given(drawn(), LENGTHS, PREFIXES)
def test_more_tokens_take_longer(setting, length, prefix):
    times = [
        predict(setting, CONSTANTS, n, prefix).seconds for n in (length, 2 * length + setting.sequence.chunk_count)
    ]
    assert times[0] < times[1]


@few
@given(drawn(), LENGTHS)
def test_chunks_do_the_same_attention(setting, length):
    """A prompt in chunks has the pairs of the whole, where chunks need no pads; transfers come on top."""
    size = setting.sequence.chunk_count * 16
    whole = visible_pairs(setting.sequence, 4 * size).sum()
    parts = [
        visible_pairs(setting.sequence, tokens, before).sum()
        for tokens, before in replace(setting, chunk=size).chunks(4 * size)
    ]
    assert sum(parts) == whole
    chunks = setting.chunks(length, 7)
    assert sum(tokens for tokens, _ in chunks) == length
    assert [before for _, before in chunks] == [7 + sum(t for t, _ in chunks[:i]) for i in range(len(chunks))]


def test_a_time_by_hand():
    """Llama, one H100 and tp 8, 2,000 tokens, with numbers written out: 8 heads of 128 and one key head each."""
    found = predict(Setting(LLAMA, H100, tp=8), CONSTANTS, 2000)
    pairs = 2000 * 2001 / 2
    assert found.attention == pytest.approx(126 * pairs * 16 * 512 / (989e12 * CONSTANTS.attention))
    active = 126 * (2 * 16384 * 16384 + 2 * 16384 * 1024 + 3 * 16384 * 53248)
    assert found.products == pytest.approx(2 * active * 2000 / 8 / (989e12 * CONSTANTS.products))


def test_few_tokens_take_the_time_of_reading_the_weights():
    setting = Setting(LLAMA, H100, tp=8)
    hidden = 4 * 126 * 16384 * 2
    assert predict(setting, CONSTANTS, 1).products == pytest.approx((weight_bytes(setting) + hidden) / 3350e9)


def test_experts_that_no_token_chose_are_not_read():
    setting = Setting(DEEPSEEK, H100, tp=8)
    one, many = (predict(setting, Constants(attention=1, products=1), n).products for n in (1, 4096))
    assert one < (weight_bytes(setting) / 3350e9) / 5 < many


@few
@given(drawn(), LENGTHS)
def test_equal_parts_are_the_mean(setting, length):
    blocks = [block_seconds(setting, CONSTANTS, n, before).sum(axis=1) for n, before in setting.chunks(length)]
    assert ideal_layer(setting, CONSTANTS, length) == pytest.approx(sum(x.mean() for x in blocks))
    assert ideal_layer(setting, CONSTANTS, length) <= attention_layer(setting, CONSTANTS, length) * (1 + 1e-12)


# Memory --------------------------------------------------------------------------------------------------------------


@few
@given(drawn(), st.integers(1, 200_000), PREFIXES)
def test_memory_is_its_parts_and_grows(setting, length, prefix):
    found = memory(setting, length, prefix)
    assert found.total == sum(found)
    assert memory(setting, length + 2 * setting.cp, prefix).total >= found.total
    assert memory(setting, length, prefix + 1).total > found.total


@few
@given(drawn(), PREFIXES)
def test_the_longest_prompt_fits_and_no_longer_one(setting, prefix):
    longest, step = longest_prompt(setting, prefix), setting.sequence.chunk_count
    assert longest % step == 0
    assert longest == 0 or fits(setting, longest, prefix)
    assert not fits(setting, longest + step, prefix)


def test_weights_and_cache_by_hand():
    """DeepSeek-R1 in 8 bits: experts over 16 cards, the rest over 8; 1,152 bytes a token and layer over 16 cards."""
    setting = Setting(DEEPSEEK, devices()["800i-a3"], 2, 8, moe_ep=16, sp=8, exchange="gather")
    experts = 58 * 256 * 3 * 7168 * 2048
    found = memory(setting, 4096)
    assert found.weights == pytest.approx(experts / 16 + (DEEPSEEK.total - experts) / 8)
    assert found.cache == 4096 / 16 * 1152 * 61
    assert fits(setting, 4096) == (found.total <= USABLE * 64e9)


# Published times -----------------------------------------------------------------------------------------------------


def test_the_fit_gives_the_shipped_constants_and_both_points():
    found = fit()
    assert found.model_dump() == pytest.approx(CONSTANTS.model_dump(), rel=1e-9)
    for of in ("attention", "products"):
        publication, length, seconds = point(of)
        assert predicted(publication, CONSTANTS, length) == pytest.approx(seconds, rel=1e-8)


def test_each_constant_is_fixed_by_its_point_alone():
    """The point of attention has no products in it; that of products has both, and is solved second."""
    publication, length, _ = point("attention")
    other = CONSTANTS.model_copy(update={"products": 0.9})
    assert predicted(publication, other, length) == predicted(publication, CONSTANTS, length)


def test_rows_say_what_they_are():
    found = list(rows(CONSTANTS))
    assert len(found) == sum(len(publication.points) for publication in publications().values())
    assert [f"{row.name} {row.tokens}" for row in found if row.fitted] == [
        shipped("constants")["points"][of] for of in ("products", "attention")
    ]
    for row in found:
        assert row.predicted is not None or row.publication.not_counted
        assert not (row.counted and row.publication.not_counted)
        assert row.publication.source
        if row.counted and abs(row.error) > 0.15:
            assert row.publication.misses, row.name
    assert not any(row.counted for row in found if "waits" in (row.publication.not_counted or ""))
    lines = list(why(found))
    assert sum("off by more than 15%" in line for line in lines) == 13
    assert lines.count("  not counted: a prompt waits for those before it.") == 4
    # The page is what `make plan` makes of them.
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    assert published_markdown(found) in page
    assert all(line.strip() in page for line in lines)
    assert all(f"{value:.4f}" in page for value in CONSTANTS.model_dump().values())


# Gain ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.sampled_from([LLAMA, DEEPSEEK]), DEVICES, st.sampled_from([2, 8]), st.sampled_from(EXCHANGES))
def test_where_cp_pays_it_is_faster_and_just_before_it_is_not(model, device, cp, exchange):
    base = Setting(model, device, tp=8, exchange=exchange)
    other = replace(base, cp=cp)

    def is_faster(length):
        return predict(other, CONSTANTS, length).seconds < predict(base, CONSTANTS, length).seconds

    found = pays_from(other, base, CONSTANTS)
    if found is None:
        assert not is_faster(2**20)
    else:
        assert is_faster(found)
        assert found == SHORTEST or not is_faster(found - SHORTEST)


def test_cards_are_kept_or_come_with_cp():
    base = Setting(DEEPSEEK, devices()["800i-a3"], 2, 8, moe_ep=16, sp=8)
    same = settings_of(base, (1, 2, 4), 16)
    assert [(one.cp, one.tp, one.cards, one.ep, one.sp) for one in same] == [
        (1, 16, 16, 16, 16), (2, 8, 16, 16, 8), (4, 4, 16, 16, 4)
    ]  # fmt: skip
    more = settings_of(base, (1, 2, 4), None)
    assert [(one.cp, one.tp, one.ep) for one in more] == [(1, 8, 8), (2, 8, 16), (4, 8, 32)]
    found = plan(same, CONSTANTS, (4096, 8192))
    assert found.speedup(found.choices[0], 1) == 1
    assert found.choices[0].pays is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cp": 0}, "cp is 0; it must be from 1"), ({"tp": 3}, "tp is 3, which does not divide"),
        ({"partition": "blocks"}, "partition 'blocks' is not known here"), ({"exchange": "x"}, "exchange 'x'"),
        ({"chunk": 0}, "chunk is 0"), ({"moe_ep": 3}, r"moe_ep 3 · moe_tp 1 is not cp 2 · tp 8, 16 cards"),
    ],
)  # fmt: skip
def test_what_nobody_could_run_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(Setting(DEEPSEEK, H100, 2, 8), **change)
