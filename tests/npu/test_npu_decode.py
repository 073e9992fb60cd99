"""Decode over a cache that is cut by tokens, through real processes, against dense and against the specification."""

import json
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_crosscheck import crosschecked
from npu_strategies import write_decode
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import examples

from cpjax.crosscheck.files.case import read_case
from cpjax.crosscheck.run.session import judge_result
from cpjax.partition.kv_cache import tokens_per_rank
from npu_backend import decode, files
from npu_backend.__main__ import main
from npu_backend.decode import Decoding, held_tokens, merge, partial_of, seen_lengths
from npu_backend.errors import InputError, RankError
from npu_backend.families import FAMILIES
from npu_backend.operators import Partial
from npu_backend.rank import Settings
from npu_backend.shard import check_computable

CP = (1, 2, 3, 4)
CPU = torch.device("cpu")


DIMS = {"ring_mla": ((576, 512), (8, 1)), "fia": ((192, 128), (4, 2)), "fusion": ((192, 128), (2, 2))}


@given(st.integers(1, 3000), st.integers(1, 16))
def test_blocks_are_where_the_specification_puts_them(length, cp):
    held = [held_tokens(length, rank, cp) for rank in range(cp)]
    assert [len(x) for x in held] == tokens_per_rank(length, cp)
    assert sorted(np.concatenate(held)) == list(range(length))


@pytest.mark.parametrize("cp", CP)
@examples(0.08)
@given(data=st.data())
def test_decode_agrees_with_dense_and_the_specification(pools, cp, data):
    lengths = data.draw(st.lists(st.sampled_from((1, 5, 128, 129, 300, 700)), min_size=1, max_size=3))
    new = [data.draw(st.integers(1, min(n, 3))) for n in lengths]
    operators = data.draw(st.sampled_from(sorted(FAMILIES)))
    dims, heads = DIMS[operators]
    if operators == "fia" and data.draw(st.booleans()):
        dims, heads = DIMS["ring_mla"]  # vLLM-Ascend's decode of the latent
    lse = "float32" if operators == "ring_mla" else data.draw(st.sampled_from(decode.LSES))
    how = data.draw(st.sampled_from(decode.MERGES))
    with tempfile.TemporaryDirectory() as folder:
        seed = data.draw(st.integers(0, 2**32 - 1))
        case = write_decode(folder, lengths, new, cp=cp, seed=seed, dims=dims, heads=heads)
        crosschecked(pools[cp], case, Settings(operators=operators, decoding=Decoding(lse, how)))


def test_the_default_loses_nothing_and_the_result_says_what_was_chosen(pools, tmp_path):
    assert Decoding() == ("float32", "attention-update", "mindie", 1)
    case = write_decode(tmp_path, [300, 5], [1, 2], cp=2)
    for lse, precision in (("float32", "fia_fp16"), ("float16", "decode_fp16_lse")):
        result = tmp_path / "r" / f"{lse}.safetensors"
        result.parent.mkdir(exist_ok=True)
        pools[2].run(case, result, settings=Settings(operators="fia", decoding=Decoding(lse)))
        with safe_open(result, framework="numpy") as file:
            metadata = file.metadata()
        assert (metadata["precision"], metadata["order"]) == (precision, "ascending")
        assert json.loads(metadata["about"])["decode"] == Decoding(lse)._asdict()
    a, b = (load_file(tmp_path / "r" / f"{x}.safetensors") for x in decode.LSES)
    assert any((a[x] != b[x]).any() for x in a)  # else FP16 was not on the way


def test_ranks_without_a_token_change_nothing(tmp_path):
    """5 tokens are one block: ranks 1 to 3 hold none."""
    case = files.read_case(write_decode(tmp_path, [5], [2], cp=4))
    partials = [partial_of(case, rank, FAMILIES["ring_mla"], CPU) for rank in range(4)]
    for out, lse in partials[1:]:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    for how in decode.MERGES:
        out, lse = merge(partials, how)
        # One merge: out moves by a place of FP16 at most, lse by a few roundings of float32's exp and log.
        torch.testing.assert_close(out, partials[0].out, rtol=2.0**-10, atol=0)
        torch.testing.assert_close(lse, partials[0].lse, rtol=1e-6, atol=1e-6)
    nobody = merge(partials[1:], "attention-update")  # NaN in the operator itself
    assert (nobody.out == 0).all()
    assert (nobody.lse == -torch.inf).all()


@pytest.mark.parametrize(("lse", "survives"), [(88.0, True), (89.0, False), (-100.0, True), (-105.0, False)])
def test_where_the_merge_without_a_maximum_breaks(lse, survives):
    partials = [Partial(torch.full((1, 1, 1, 8), x).half(), torch.full((1, 1, 1), lse)) for x in (1.0, 3.0)]
    right, mindie = merge(partials, "attention-update"), merge(partials, "without-maximum")
    assert (right.out == 2).all()
    assert bool((mindie.out == 2).all()) == survives
    assert bool(mindie.out.isnan().all()) != survives


# Faults: each in one rank's partial or in the merge; the verdict, or the exchange, must notice.


def decoded(case, change=lambda partials: partials, cp=3):
    """All ranks in this process; `change` is the fault."""
    partials = [partial_of(case, rank, FAMILIES["fia"], CPU) for rank in range(cp)]
    return merge(change(partials), "attention-update")


def neighbours_lse(partials):
    return [Partial(p.out, partials[i - 1].lse) for i, p in enumerate(partials)]


def swapped_outs(partials):
    return [Partial(partials[(1, 0, 2)[i]].out, p.lse) for i, p in enumerate(partials)]


FAULTS = {
    "a rank dropped": lambda partials: partials[1:],
    "a rank twice": lambda partials: [*partials, partials[0]],
    "outs swapped": swapped_outs,
    "lse of a neighbour": neighbours_lse,
    "no rescale": lambda partials: [Partial(p.out, torch.zeros_like(p.lse)) for p in partials],
    "lse in base 2": lambda partials: [Partial(p.out, p.lse * 1.4427) for p in partials],
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_verdict_notices_a_broken_merge(tmp_path, fault):
    case = write_decode(tmp_path, [700, 420], [2, 1], cp=3)
    asked = files.read_case(case)
    out, lse = (x.transpose(0, 1).contiguous().numpy() for x in decoded(asked, FAULTS.get(fault, lambda x: x)))
    (tmp_path / "r").mkdir()
    ranks = [files.RankResult(out, lse, asked.q_position, asked.q_segment)] * 3
    result = tmp_path / "r" / case.name
    files.write_result(result, asked, ranks, precision="fia_fp16", order="ascending", about={})
    assert judge_result(read_case(case), result).passed == (fault is None)


def test_a_rank_that_merged_otherwise_is_noticed(pools, tmp_path):
    case, result = write_decode(tmp_path, [300], [1], cp=2), tmp_path / "r.safetensors"
    pools[2].run(case, result)
    with safe_open(result, framework="numpy") as file:
        tensors, metadata = load_file(result), file.metadata()
    tensors["out.1"].view(np.uint16)[0, 0, 0, 0] ^= 1
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata)
    assert judge_result(read_case(case), result).passed
    assert "out of rank 1 is not rank 0's" in judge_result(read_case(case), bad).reasons[0]


def test_a_partial_of_another_rank_is_refused(tmp_path, monkeypatch):
    case = files.read_case(write_decode(tmp_path, [700], [1], cp=3))

    def gather(self, mine):
        tags = [[rank, *seen_lengths(case, rank)] for rank in (1, 0, 2)]
        return [mine._replace(places=torch.tensor(tag)) for tag in tags]

    monkeypatch.setattr(decode.Link, "gather", gather)
    with pytest.raises(RankError, match="step 0: a wrong partial; in the place of rank 0 is rank 1's"):
        decode.decode_attention(case, 0, FAMILIES["ring_mla"], Decoding(), CPU, lambda what, step: None)


@pytest.mark.parametrize(
    ("options", "operators", "rule"),
    [
        ({"dims": (192, 128), "heads": (2, 1)}, "ring_mla", "takes the latent, 576 and 512"),
        ({"heads": (4, 1)}, "ring_mla", "query heads"),
        ({"scale": 2.0}, "ring_mla", "more than 0 and at most 1"),
        ({"dims": (64, 32), "heads": (1, 1)}, "fia", "head dims are 64 and 32"),
        ({"is_causal": False}, "fia", "one causal row"),
    ],
)
def test_what_decode_cannot_compute_is_refused(tmp_path, options, operators, rule):
    case = files.read_case(write_decode(tmp_path, [30], [1], cp=2, **options))
    with pytest.raises(InputError, match=rule):
        check_computable(case, FAMILIES[operators])


def test_places_that_are_no_decode_are_refused(tmp_path):
    case = files.read_case(write_decode(tmp_path, [30, 20], [1, 1], cp=2))
    check_computable(case, FAMILIES["ring_mla"])
    for changed in (
        case._replace(q_position=case.q_position - 1),
        case._replace(kv_position=case.kv_position[:, ::-1]),
        case._replace(kv_segment=case.kv_segment * 0),
        case._replace(rows=(case.rows[0], case.rows[1] + np.float16(1))),
    ):
        with pytest.raises(InputError):
            check_computable(changed, FAMILIES["ring_mla"])


def test_the_command_decodes(tmp_path):
    write_decode(tmp_path, [300, 1], [1, 1], cp=2)
    case, results = tmp_path / "decode.safetensors", tmp_path / "r"
    assert main(["run", str(case), str(results), "--lse", "float16", "--merge", "without-maximum"]) == 0
    assert judge_result(read_case(case), results / "decode.safetensors").passed


@pytest.mark.parametrize(
    ("changes", "arguments", "rule"),
    [
        ({}, ["--profile"], "--profile times the steps of prefill"),
        ({"precision": {"npu": "flash_fp16"}}, [], "compute in decode_fp16_lse"),
        ({"precision": {"npu": "decode_fp16_lse"}}, ["--operators", "fia"], "lse in float32 compute in fia_fp16"),
    ],
)
def test_options_that_do_not_go_with_decode_are_refused(tmp_path, capsys, changes, arguments, rule):
    case = write_decode(tmp_path, [30], [1], cp=2, **changes)
    assert main(["run", str(case), str(tmp_path / "r"), *arguments]) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_bf16_is_refused_with_the_rule(tmp_path):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = write_decode(tmp_path, [30], [1], cp=2)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_torch(path)
    save_torch({x: y.bfloat16() if y.dtype == torch.float16 else y for x, y in tensors.items()}, path, metadata)
    with pytest.raises(InputError, match="is BF16; MindIE's context parallelism is FP16 only"):
        files.read_case(path)
