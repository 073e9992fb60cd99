"""The latent travels and each rank makes keys and values of it: through real processes, against dense and `cpjax`."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_crosscheck import computed, crosschecked
from npu_strategies import SCALE, problem, write_latent, write_pack, write_tensors
from programs import mesh
from safetensors import safe_open
from safetensors.numpy import load_file
from strategies import examples

from cpjax.attention import Attention
from cpjax.crosscheck.files.case import read_case
from cpjax.crosscheck.files.result import Result
from cpjax.crosscheck.run.compare import compare
from cpjax.errors import InputError as SpecificationError
from cpjax.latent import UpProjection, latent_attention_on_device
from cpjax.mask import Mask, Tokens
from cpjax.partition import Zigzag
from cpjax.precision import profile
from npu_backend import files
from npu_backend.errors import InputError, RankError
from npu_backend.families import FAMILIES
from npu_backend.latent import check_same, expand, up_projection
from npu_backend.rank import Settings
from npu_backend.ring import held_by
from npu_backend.schedule import Exchange
from npu_backend.shard import check_computable, shard

CP = (1, 2, 3, 4)
PRECISION = {name: family.precision for name, family in FAMILIES.items()}
EXCHANGES = [Exchange("gather"), Exchange("ring"), Exchange("double-ring", 1)]


@pytest.mark.parametrize("cp", CP)
@pytest.mark.parametrize("operators", FAMILIES)
def test_every_exchange_and_family_agrees_with_dense_and_the_specification(pools, tmp_path, cp, operators):
    for i, exchange in enumerate(EXCHANGES):
        p = problem(cp, "normal", (2, 1), (30, 24), 48, is_causal=i != 1, cp=cp)
        kind = "needle" if i == 2 else "normal"
        case = write_latent(tmp_path, p, 40, kind, f"c{i}", precision={"npu": PRECISION[operators]})
        crosschecked(pools[cp], case, Settings(exchange, operators))


@pytest.mark.parametrize("cp", CP)
@examples(0.08)
@given(data=st.data())
def test_drawn_latents_agree_with_dense(pools, cp, data):
    draw = data.draw
    chosen = Settings(draw(st.sampled_from(EXCHANGES)), draw(st.sampled_from(sorted(FAMILIES))))
    seed, is_causal = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    width, kind = draw(st.sampled_from((1, 7, 40, 512))), draw(st.sampled_from(("normal", "whole", "needle")))
    heads, precision = (draw(st.sampled_from((1, 2, 4))), 1), {"npu": PRECISION[chosen.operators]}
    with tempfile.TemporaryDirectory() as folder:
        if draw(st.booleans()):
            lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=2))
            total = -(-max(lengths) // (2 * cp)) * 2 * cp
            p = problem(seed, "normal", heads, lengths, total, is_causal=is_causal, cp=cp)
            case = write_latent(Path(folder), p, width, kind, seed=seed, precision=precision)
        else:
            lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
            prefixes = [draw(st.sampled_from((0, 1, 128, 150, 300))) for _ in lengths]
            case = write_pack(
                Path(folder), lengths, prefixes, cp=cp, is_causal=is_causal, seed=seed, heads=heads,
                precision=precision["npu"], latent=width, kind=kind,
            )  # fmt: skip
        _, result = computed(pools[cp], case, chosen)
    assert result.key_value is not None


@pytest.mark.parametrize("cp", [2, 4])
def test_packs_with_prefixes_agree_with_the_specification(pools, tmp_path, cp):
    case = write_pack(tmp_path, (9, 1, 20), (300, 0, 150), cp=cp, is_causal=True, seed=cp, latent=40, kind="needle")
    crosschecked(pools[cp], case, Settings(Exchange("gather")))


@pytest.mark.parametrize("layout", ["zigzag", "packed"])
def test_what_is_made_is_the_same_in_every_exchange_and_is_all_that_differs_from_a_case_of_keys(
    pools, tmp_path, layout
):
    """A plain case of the keys and values that the result states gives the same bits, in every exchange."""
    if layout == "zigzag":
        p = problem(2, "normal", (2, 1), (64, 49), 64, is_causal=True, cp=4)
        path = write_latent(tmp_path, p, 512, "normal")
    else:
        path = write_pack(tmp_path, (9, 30), (300, 5), cp=4, is_causal=True, seed=3, latent=512)
    case, tensors = read_case(path), load_file(path)
    found = {exchange.name: computed(pools[4], path, Settings(exchange))[1] for exchange in EXCHANGES}
    key, value = found["gather"].key_value
    for exchange in EXCHANGES:
        result = found[exchange.name]
        for mine, others in zip(result.key_value, (key, value), strict=True):
            np.testing.assert_array_equal(mine.view(np.int16), others.view(np.int16))
        for made in ("c_kv", "k_rope", "w_uk", "w_uv"):
            tensors.pop(made, None)
        plain = write_tensors(
            tmp_path / f"plain-{exchange.name}.safetensors", tensors | {"key": key, "value": value}, _description(path)
        )
        _, same = computed(pools[4], plain, Settings(exchange))
        real = np.asarray(case.q_tokens.segment) >= 0
        np.testing.assert_array_equal(result.out[real].view(np.int16), same.out[real].view(np.int16))
        np.testing.assert_array_equal(result.lse[real].view(np.int32), same.lse[real].view(np.int32))


def _description(path: Path) -> str:
    with safe_open(path, framework="numpy") as file:
        return file.metadata()["case"]


@functools.cache
def program(cp: int, exchange: str, scale: float):
    """The specification's own exchange of latents."""
    attention = Attention(Mask(is_causal=True), scale, profile("ring_mla_fp16"))
    how = {"axis_name": "cp", "exchange": exchange, "chunks": Zigzag(cp).chunks_per_rank}

    def device(query, c_kv, k_rope, up, q_tokens, kv_tokens):
        return latent_attention_on_device(query, c_kv, k_rope, up, q_tokens, kv_tokens, attention, **how)

    spread = jax.P(None, "cp")
    specs = (spread, spread, spread, jax.P(), spread, spread)
    return jax.jit(jax.shard_map(device, mesh=mesh(cp), in_specs=specs, out_specs=spread))


@pytest.mark.parametrize("name", ["gather", "ring"])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_agrees_with_the_specifications_exchange_of_latents(pools, tmp_path, cp, name):
    """Whole numbers, so that both make the same keys and values; then they differ as any two correct results do."""
    p = problem(cp, "normal", (2, 1), (48, 41), 48, is_causal=True, cp=cp)
    path = write_latent(tmp_path, p, 24, "whole")
    case, npu = computed(pools[cp], path, Settings(Exchange(name)))
    real = np.asarray(case.kv_tokens.segment) >= 0
    for made, right in zip(npu.key_value, (case.key, case.value), strict=True):
        np.testing.assert_array_equal(made[real], right[real])
    latent, at = case.latent, Zigzag(cp).order(48)
    tokens = Tokens(*(np.asarray(x)[:, at] for x in case.q_tokens))
    held = (np.where(real[..., None], x, 0)[:, at] for x in (latent.c_kv, latent.k_rope))
    query = np.where(real[..., None, None], case.query, 0)[:, at]
    found = program(cp, name, SCALE)(query, *held, UpProjection(latent.w_uk, latent.w_uv), tokens, tokens)
    back = np.argsort(at)
    out, lse = (np.asarray(x).astype(dtype)[:, back] for x, dtype in zip(found, (np.float16, np.float32), strict=True))
    agreement = compare(case, npu, Result("spec", "ring_mla_fp16", name, out, lse, {}))
    assert agreement.agrees, agreement.reasons
    assert agreement.z < 0.25  # the same stages in the same order: `SAME_STAGES` of test_npu_exchange.py


def test_a_profile_is_written_of_a_latent_too(pools, tmp_path):
    p = problem(1, "normal", (2, 1), (32,), 32, is_causal=True, cp=2)
    _, result = computed(pools[2], write_latent(tmp_path, p, 64, "normal"), Settings(profile=True))
    assert [len(of_rank["transfer_alone"]) for of_rank in result.about["profile"]] == [2, 2]
    assert all(x > 0 for of_rank in result.about["profile"] for x in of_rank["compute"])


def test_one_row_a_token_travels(tmp_path):
    p = problem(1, "normal", (4, 1), (16,), 16, is_causal=True, cp=2)
    mine = shard(files.read_case(write_latent(tmp_path, p, 512, "normal")), 1)
    (row,) = held_by(mine, torch.device("cpu")).rows
    assert (row.shape, row.dtype) == ((1, 8, 1, 576), torch.float16)


@examples(0.3)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 5, 64, 512)), st.integers(1, 4))
def test_keys_and_values_are_the_products(seed, width, heads):
    """In float64, to within float32 sums and one rounding; the rotary part is copied to all heads."""
    rng = np.random.default_rng(seed)
    latent, w_uk, w_uv = (
        torch.from_numpy(rng.normal(size=x)).half()
        for x in ((2, 3, 1, width + 6), (width, heads, 10), (width, heads, 4))
    )
    key, value = expand(latent, up_projection(w_uk, w_uv))
    c_kv = latent[:, :, 0, :width].double()
    for made, w in ((key[..., :10], w_uk.double()), (value, w_uv.double())):
        exact, size = torch.einsum("bsc,cnd->bsnd", c_kv, w), torch.einsum("bsc,cnd->bsnd", abs(c_kv), abs(w))
        room = (width - 1) * 2.0**-24 * size
        assert bool((((exact - room).half() <= made) & (made <= (exact + room).half())).all())
    assert torch.equal(key[..., 10:], latent[..., width:].expand(-1, -1, heads, -1))


def test_ranks_that_made_other_keys_are_named():
    check_same([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}])
    with pytest.raises(RankError, match="rank 1 has made other keys and values of b than rank 0"):
        check_same([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])


# What cannot be read or computed --------------------------------------------------------------------------------------


SMALL = problem(1, "normal", (2, 1), (8,), 8, is_causal=True, cp=2)


def changed(tmp_path, edit):
    """A latent case whose tensors were edited before it was written."""
    path = write_latent(tmp_path, SMALL, 16, "normal")
    tensors = load_file(path)
    edit(tensors)
    return write_tensors(path, tensors, _description(path))


WRONG = [
    (lambda x: x.pop("w_uv"), r"missing tensors \['w_uv'\]"),
    (lambda x: x.update(key=x["query"]), r"unknown tensors \['key'\]"),
    (
        lambda x: x.update(k_rope=x["k_rope"][..., :32]),
        r"query head dim 192 is not that of 'w_uk' and 'k_rope', 128 \+ 32",
    ),
    (lambda x: x.update(w_uk=x["w_uk"][:5]), "C is"),
    (lambda x: x.update(w_uk=x["w_uk"].astype(np.float32)), "'w_uk' is F32"),
]


@pytest.mark.parametrize(("edit", "rule"), WRONG)
@pytest.mark.parametrize(("read", "error"), [(files.read_case, InputError), (read_case, SpecificationError)])
def test_a_latent_that_is_none_is_refused_by_both_readers(tmp_path, edit, rule, read, error):
    path = changed(tmp_path, edit)
    with pytest.raises(error, match=rule):
        read(path)


@pytest.mark.parametrize(("read", "error"), [(files.read_case, InputError), (read_case, SpecificationError)])
def test_decode_takes_its_latent_as_a_head(tmp_path, read, error):
    path = write_latent(tmp_path, SMALL, 16, "normal", layout="decode")
    with pytest.raises(error, match="decode takes the latent as key and value of one head"):
        read(path)


def test_head_dims_that_the_operator_does_not_take_are_refused(tmp_path):
    case = files.read_case(changed(tmp_path, lambda x: x.update(w_uv=x["w_uv"][..., :64])))
    with pytest.raises(InputError, match=r"head dims are 192 \(query, key\) and 64 \(value\)"):
        check_computable(case)


def test_both_readers_read_the_same(tmp_path):
    path = write_latent(tmp_path, SMALL, 16, "normal")
    ours, theirs = read_case(path), files.read_case(path)
    np.testing.assert_array_equal(
        theirs.rows[0][:, :, 0], np.concatenate([ours.latent.c_kv, ours.latent.k_rope], axis=2)
    )
    for mine, his in zip(theirs.up, (ours.latent.w_uk, ours.latent.w_uv), strict=True):
        np.testing.assert_array_equal(mine, his)
