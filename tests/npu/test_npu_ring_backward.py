"""The ring backwards over real processes: the derivative of dense attention, and the specification's own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from npu_gradients import SCALE, Training, rank_of
from test_npu_operators_grad import dense_gradients, dense_out

from cpjax.crosscheck import judge_gradients
from cpjax.mask import Mask, Tokens
from cpjax.parallel import context_parallel_attention, cp_mesh
from npu_backend.errors import InputError, RankError
from npu_backend.exchange import Held
from npu_backend.families import FAMILIES
from npu_backend.operators import Carried, fusion_block, fusion_block_backward
from npu_backend.packing import held_rows
from npu_backend.ring_backward import ring_backward, ring_forward
from npu_backend.schedule import Exchange, chunk_count
from npu_backend.shard import PAD, Requests

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


def training(seed, cp, lengths, *, is_pack, is_causal, dtype: type = np.float32, heads=(4, 2), **options) -> Training:
    """Requests of these lengths, one a row or all in one; each is padded as it must be, and once more."""
    rng, unit = np.random.default_rng(seed), chunk_count(cp)
    pieces = 2 * cp // unit  # requests are padded to 2·cp tokens, though a rank alone holds one chunk
    if is_pack:
        chunks = tuple(-(-n // (2 * cp)) * pieces for n in lengths)
        rows = np.concatenate([np.where(np.arange(unit * c) < n, i, PAD) for i, (n, c) in enumerate(zip(lengths, chunks, strict=True))])[None]  # fmt: skip  # noqa: E501
        requests = Requests(chunks, tuple((n,) for n in lengths), (0,) * len(lengths))
    else:
        chunk = -(-max(lengths) // unit) + 1
        rows = np.stack([np.where(np.arange(unit * chunk) < n, 0, PAD) for n in lengths])
        requests = Requests((chunk,), (tuple(lengths),), (0,))
    (n, k), shape = heads, rows.shape
    tensors = [rng.normal(size=(*shape, *tail)).astype(dtype) for tail in ((n, 64), (k, 64), (k, 64), (n, 64))]
    for x in tensors:
        x[rows == PAD] = np.nan
    return Training(tuple(tensors), rows.astype(np.int32), requests, is_causal, cp, **options)


def run(folder: Path, problems: list[Training]) -> list[list[np.ndarray]]:
    """Out, dq, dk, dv of each problem in global order, by cp processes."""
    cp = problems[0].cp
    torch.save(problems, folder / "problems")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "npu_gradients", str(folder), str(rank), str(cp)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(cp)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), errors
    found = [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(cp)]
    results = []
    for i, p in enumerate(problems):
        whole = [np.full_like(found[0][i][j], np.nan, shape=x.shape) for j, x in enumerate((p.tensors[3], *p.tensors[:3]))]  # fmt: skip  # noqa: E501
        for rank in range(cp):
            for x, part in zip(whole, found[rank][i], strict=True):
                x[:, held_rows(rank, cp, p.requests.chunk_lengths)] = part
        results.append(whole)
    return results


def hidden_of(p: Training) -> torch.Tensor:
    index, segment = np.arange(p.segment.shape[1]), p.segment
    seen = (segment[:, :, None] == segment[:, None, :]) & (segment != PAD)[:, :, None]
    return ~torch.from_numpy(seen & (index[:, None] >= index) if p.is_causal else seen)[:, None]


def dense_of(p: Training) -> tuple[np.ndarray, ...]:
    """Out, dq, dk, dv in float64."""
    tensors = [torch.from_numpy(np.nan_to_num(x)).double() for x in p.tensors]
    hidden = hidden_of(p)
    return tuple(x.numpy() for x in (dense_out(*tensors[:3], hidden, SCALE), *dense_gradients(*tensors, hidden, SCALE)))


def spec_of(p: Training) -> tuple[np.ndarray, ...]:
    """dq, dk, dv by the specification's ring under jax.grad, in float64."""
    tensors = [np.nan_to_num(x).astype(np.float64) for x in p.tensors]
    places = Tokens(p.position, p.segment)
    mask = Mask() if p.is_causal else Mask(is_causal=False)
    lengths = tuple(n for (n,) in p.requests.lengths) if len(p.requests.lengths) > 1 else None

    def loss(q, k, v, dy):
        places_of = (places, places) if lengths is None else ()
        options = {"mesh": cp_mesh(p.cp), "mask": mask, "scale": SCALE, "precision": "float64", "lengths": lengths}
        return (context_parallel_attention(q, k, v, *places_of, **options).out * dy).sum()

    with jax.enable_x64(True):
        return tuple(np.asarray(x) for x in jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, tensors)))


def assert_near(p: Training, got, want, tolerance: float):
    """At real tokens; pads have no gradient at all."""
    real = p.segment != PAD
    for a, b in zip(got, want, strict=True):
        assert (abs(a.astype(np.float64) - b) <= tolerance * (1 + abs(b).max()))[real].all()
    for x in got[1:]:
        assert (x[~real] == 0).all()


def assert_certified(p: Training, found: list[np.ndarray]):
    """By the judge of gradients, which is told how parts are added up; what comes from one chunk more is too much."""
    query, key, value, dy = (np.nan_to_num(x) for x in p.tensors)
    out, dq, dk, dv = (np.nan_to_num(x) for x in found)
    asked = {"scale": SCALE, "is_causal": p.is_causal, "q_positions": p.position, "kv_positions": p.position}
    asked |= {"segment_ids": p.segment, "partition": "packed" if len(p.segment) == 1 else "zigzag", "cp": p.cp}
    asked |= {"over_ranks": {"float32": "float32", "float16": "out"}[p.sums]} if p.cp > 1 else {}
    verdict = judge_gradients(query, key, value, out, None, dy, dq, dk, dv, **asked)
    assert verdict.passed, verdict.text
    assert all(one.z < 1.1 for one in verdict.tensors), verdict.text
    size = -(-p.segment.shape[1] // chunk_count(p.cp))
    more = [x + np.where(np.arange(x.shape[1])[:, None, None] < size, x, 0) for x in (dq, dk, dv)]
    assert not judge_gradients(query, key, value, out, None, dy, *more, **asked).passed


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_ring_backwards_is_the_derivative(tmp_path, cp):
    kinds = [
        {"lengths": (29, 16), "is_pack": False, "is_causal": True},
        {"lengths": (29, 3), "is_pack": False, "is_causal": False},
        {"lengths": (1, 17, 40), "is_pack": True, "is_causal": True, "heads": (2, 2)},
    ]
    exact = [training(i, cp, **kind, mode="exact") for i, kind in enumerate(kinds)]
    half = [training(i, cp, **kind, dtype=np.float16) for i, kind in enumerate(kinds)]
    summed = [p._replace(sums="float16") for p in half]
    results = run(tmp_path, exact + half + summed)
    by_kind = [results[i :: len(kinds)] for i in range(len(kinds))]
    for i, (found, found_half, found_summed) in enumerate(by_kind):
        want, specified = dense_of(exact[i]), spec_of(exact[i])
        assert_near(exact[i], [want[0], *specified], want, 1e-12)
        assert_near(exact[i], found, want, 1e-6)  # in float64, but every block's result is cast to float32
        assert_near(half[i], found_half, dense_of(half[i]), 4e-3)
        assert_near(half[i], found_summed, dense_of(half[i]), 8e-3)
        assert_certified(half[i], found_half)
        assert_certified(summed[i], found_summed)
        if cp > 1:
            assert any((a != b).any() for a, b in zip(found_half[1:], found_summed[1:], strict=True))


# --- one block


def test_parts_of_the_gradient_add_up_and_rows_without_keys_have_none():
    rng = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, m, h, d, generator=rng) for m, h, d in ((6, 4, 64), (9, 2, 64), (9, 2, 64), (6, 4, 64)))  # fmt: skip  # noqa: E501
    lengths = (9, 0)
    carried = fusion_block(q, k, v, is_causal=False, scale=SCALE, kv_lengths=lengths)
    whole = fusion_block_backward(q, k, v, dy, carried, is_causal=False, scale=SCALE, kv_lengths=lengths)
    parts = [
        fusion_block_backward(q, k[:, some], v[:, some], dy, carried, is_causal=False, scale=SCALE, kv_lengths=counts)
        for some, counts in ((slice(4), (4, 0)), (slice(4, 9), (5, 0)))
    ]
    together = parts[0].query + parts[1].query, *(torch.cat(x, 1) for x in zip(*(p[1:] for p in parts), strict=True))
    want = dense_gradients(*(x[:1] for x in (q, k, v, dy)), torch.zeros(1, 1, 6, 9, dtype=torch.bool), SCALE)
    for a, b, c in zip(whole, together, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a[:1].double(), c, rtol=1e-4, atol=1e-5)
        assert (a[1] == 0).all()
    # More queries than keys: the first two see nothing here, nor anywhere.
    carried = fusion_block(q, k, v, is_causal=True, scale=SCALE, kv_lengths=(4, 4))
    found = fusion_block_backward(q, k, v, dy, carried, is_causal=True, scale=SCALE, kv_lengths=(4, 4))
    assert (found.query[:, :2] == 0).all()
    hidden = torch.ones(6, 4, dtype=torch.bool).triu(-1)[None, None]
    for a, b in zip(found, dense_gradients(q, k[:, :4], v[:, :4], dy, hidden, SCALE), strict=True):
        torch.testing.assert_close(a[:, : b.shape[1]].double(), b, rtol=1e-4, atol=1e-5)
        assert (a[:, b.shape[1] :] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, dy: (c, dy.double()), "dy is .*float64; it must be .*float32"),
        (lambda c, dy: (c, dy[:, :-1]), r"dy is \(1, 5, 4, 64\)"),
        (lambda c, dy: (c._replace(out=c.out.half()), dy), "carried.out is"),
        (lambda c, dy: (c._replace(maximum=c.maximum[..., :1]), dy), "carried.maximum is"),
        (lambda c, dy: (c._replace(total=c.total * torch.nan), dy), "infinite, negative or NaN"),
    ],
)
def test_what_a_block_cannot_take_is_refused(change, says):
    q, k, v, dy = (torch.randn(1, m, h, d) for m, h, d in ((6, 4, 64), (9, 2, 64), (9, 2, 64), (6, 4, 64)))
    carried = fusion_block(q, k, v, is_causal=False, scale=SCALE)
    carried, dy = change(carried, dy)
    with pytest.raises(InputError, match=says):
        fusion_block_backward(q, k, v, dy, carried, is_causal=False, scale=SCALE)


# --- the ring


def one_rank(cp=1):
    p = training(0, cp, (9,), is_pack=False, is_causal=True)
    return (*rank_of(p, 0), torch.device("cpu"), lambda what, step: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": FAMILIES["fia"]}, "operators fia have no gradient.*choose it"),
        ({"exchange": Exchange("gather")}, "exchange 'gather'.*exchange ring"),
        ({"requests": Requests((5,), ((9,),), (16,))}, "prefixes belong to inference"),
    ],
)
def test_what_the_ring_cannot_differentiate_is_refused_before_the_forward(change, says):
    ring, shard, dy, device, report = one_rank()
    carried = Carried(*(torch.zeros(1),) * 3)
    with pytest.raises(InputError, match=says):
        ring_forward(ring._replace(**change), shard, device, report)
    with pytest.raises(InputError, match=says):
        ring_backward(ring._replace(**change), shard, carried, torch.from_numpy(dy), device, report)


def test_a_sum_of_other_keys_is_an_error(monkeypatch):
    """As if the neighbour's sum had been computed for the rank's own keys: everything fits but the places."""
    p = training(0, 2, (9,), is_pack=False, is_causal=True)
    ring, shard, dy = rank_of(p, 0)
    other = rank_of(p, 1)[1]
    from npu_backend import ring_backward as module

    held = [module.held_by(x, torch.device("cpu")) for x in (shard, other)]

    class Link:
        def __init__(self, *_):
            pass

        def start(self, step, mine, **_):
            return mine

        def wait(self, step, passed):
            return Held(passed.rows, held[0].places)

    monkeypatch.setattr(module, "Link", Link)
    monkeypatch.setattr(module, "travel", lambda *_: iter(held))
    carried = Carried(torch.zeros(1, 12, 4, 64), torch.zeros(1, 12, 4), torch.ones(1, 12, 4))
    with pytest.raises(RankError, match="step 1: a wrong block"):
        ring_backward(ring, shard, carried, torch.from_numpy(dy), torch.device("cpu"), lambda what, step: None)
