"""vLLM-Ascend's decode over real processes: interleaved tokens, partials dealt out by heads."""

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
from safetensors.numpy import load_file
from strategies import examples

from cpjax.crosscheck.files.case import read_case
from cpjax.crosscheck.run.session import judge_result
from npu_backend.__main__ import main
from npu_backend.decode import Decoding, held_tokens, seen_lengths
from npu_backend.decode_by_heads import check_tags, exchange_by_heads
from npu_backend.errors import InputError, RankError
from npu_backend.exchange import Held
from npu_backend.files import read_case as read_npu_case
from npu_backend.operators import Partial
from npu_backend.rank import Settings, check_decoding


def engine(interleave=1):
    return Decoding(engine="vllm-ascend", interleave=interleave)


@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 200))
def test_every_token_is_on_the_rank_that_its_turn_names(length, cp, interleave):
    held = [held_tokens(length, rank, cp, engine(interleave)) for rank in range(cp)]
    assert sorted(np.concatenate(held)) == list(range(length))
    for rank, tokens in enumerate(held):
        assert all(i // interleave % cp == rank for i in tokens)


@pytest.mark.parametrize("cp", [1, 2, 4])
@examples(0.08)
@given(data=st.data())
def test_decode_by_heads_is_dense_attention(pools, cp, data):
    lengths = data.draw(st.lists(st.sampled_from((1, 5, 128, 129, 300)), min_size=1, max_size=3))
    new = [data.draw(st.integers(1, min(n, 3))) for n in lengths]
    dims, heads = data.draw(st.sampled_from((((192, 128), (4, 2)), ((576, 512), (8, 1)), ((128, 128), (4, 4)))))
    interleave = data.draw(st.sampled_from((1, 3, 128)))
    with tempfile.TemporaryDirectory() as folder:
        seed = data.draw(st.integers(0, 2**32 - 1))
        case = write_decode(folder, lengths, new, cp=cp, seed=seed, dims=dims, heads=heads)
        crosschecked(pools[cp], case, Settings(operators="fia", decoding=engine(interleave)))


def test_the_command_takes_it_and_the_result_says_so(tmp_path):
    case = write_decode(tmp_path, [30, 5], [1, 2], cp=2, dims=(128, 128), heads=(4, 4))
    results = tmp_path / "results"
    command = ["run", str(case), str(results), "--operators", "fia", "--engine", "vllm-ascend", "--interleave", "2"]
    assert main(command) == 0
    (result,) = results.iterdir()
    with safe_open(result, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["order"] == "unknown"
    assert json.loads(metadata["about"])["decode"] == engine(2)._asdict()
    assert judge_result(read_case(case), result).passed
    both = tmp_path / "mindie"
    assert main(["run", str(case), str(both), "--operators", "fia"]) == 0
    a, b = load_file(result), load_file(next(both.iterdir()))
    assert any((a[name] != b[name]).any() for name in a)  # other tokens a rank: other roundings


@pytest.mark.parametrize(
    ("settings", "heads", "says"),
    [
        (Settings(operators="fusion", decoding=engine()), (4, 4), "--operators fia.*not with fusion"),
        (Settings(operators="fia", decoding=engine()._replace(lse="float16")), (4, 4), "lse float16"),
        (Settings(operators="fia", decoding=engine()._replace(merge="without-maximum")), (4, 4), "without-maximum"),
        (Settings(operators="fia", decoding=engine(0)), (4, 4), "--interleave 0"),
        (Settings(operators="fia", decoding=engine()), (3, 3), "3 heads.*deals them out to 2 ranks"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, heads, says):
    case = read_npu_case(write_decode(tmp_path, [30], [1], cp=2, dims=(128, 128), heads=heads))
    with pytest.raises(InputError, match=says):
        check_decoding(case, settings)


def test_a_partial_of_another_rank_is_an_error(tmp_path):
    case = read_npu_case(write_decode(tmp_path, [30], [1], cp=2, dims=(128, 128), heads=(4, 4)))
    tags = [torch.tensor([rank, *seen_lengths(case, rank, engine(4))], dtype=torch.int32) for rank in range(2)]
    assert [x.tolist() for x in tags] == [[0, 16], [1, 14]]
    arrived = [Held((torch.zeros(1),), tag) for tag in tags]
    check_tags(arrived, tags)
    with pytest.raises(RankError, match=r"in the place of rank 0 is rank 1's, which saw \[14\] tokens and not \[16\]"):
        check_tags(arrived[::-1], tags)


def test_a_rank_without_tokens_changes_nothing():
    """Heads are dealt out and put together again in their order, with (0, −inf) from the rank that holds nothing."""
    generator = torch.Generator().manual_seed(0)
    out, lse = torch.randn(3, 1, 4, 64, generator=generator).half(), torch.randn(3, 1, 4, generator=generator)
    nothing = Held((torch.cat([torch.zeros(2, 64, 3), torch.full((2, 1, 3), -torch.inf)], 1),), torch.tensor([1, 0]))
    tags = [torch.tensor([0, 9]), nothing.places]

    class Link:
        rank, cp = 0, 2

        def deal(self, parts):
            return [parts[0], nothing]

        def gather(self, share):
            return [share, Held((out[:, :, 2:], lse[:, :, 2:]), tags[1])]

    got = exchange_by_heads(Link(), Partial(out, lse), tags)
    assert torch.equal(got.out, out)
    torch.testing.assert_close(got.lse, lse, rtol=1e-6, atol=1e-6)
