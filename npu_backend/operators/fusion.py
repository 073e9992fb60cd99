"""npu_fusion_attention and npu_ring_attention_update in our words and shapes: MindSpeed's ring."""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.contracts.fusion import COPIES
from npu_backend.contracts.layouts import from_sequence_order, laid_out, to_sequence_order, tokens_first
from npu_backend.contracts.sparse import TRIANGLE
from npu_backend.errors import InputError
from npu_backend.operators.blocks import check_block, ends, saw_a_key
from npu_backend.operators.partial import Partial

Layout = Literal["SBH", "TND"]


class Carried(NamedTuple):
    """What this family carries from block to block: lse = maximum + ln total. No key seen: (0, −inf, 0)."""

    out: Tensor  # [B, t, N, V], the dtype of the inputs
    maximum: Tensor  # [B, t, N] float32, of the scaled scores
    total: Tensor  # [B, t, N] float32, Σ exp(score − maximum)

    def partial(self) -> Partial:
        """As the other families have it."""
        return Partial(self.out, self.maximum + self.total.log())


def fusion_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    q_lengths: tuple[int, ...] | None = None,
    kv_lengths: tuple[int, ...] | None = None,
    layout: Layout = "TND",
) -> Carried:
    """Attention of one query chunk over one key chunk; one call of npu::npu_fusion_attention.

    Args:
      query: `[B, t, N, H]` float16, bfloat16 or float32.
      key, value: `[B, s, K, H]`, `[B, s, K, V]`, V ≤ H ≤ 768; N is a multiple of K.
      is_causal: query i sees key j iff j ≤ i + (keys − queries), counted per request: the last query sees every key.
      scale: multiplies q·k, in float32.
      q_lengths, kv_lengths: the first so many tokens of each request count, the others are pads; None: all.
      layout: TND packs the tokens without pads; SBH has no lengths, so there all tokens must count.

    Returns:
      The block's partial; (0, −inf, 0) for queries that see no key, pads included.

    Raises:
      InputError: what the operator cannot express.
    """
    batch, length, heads, _ = query.shape
    q_lengths = (length,) * batch if q_lengths is None else q_lengths
    kv_lengths = (key.shape[1],) * batch if kv_lengths is None else kv_lengths
    check_fusion_block(query, key, value, scale, q_lengths, kv_lengths, layout)
    vendor.require("npu::npu_fusion_attention", query.device)
    empty = _empty(query, value.shape[3])
    # Packed sequences without queries or keys are not passed: what comes out for them is not documented.
    live = [i for i in range(batch) if q_lengths[i] and kv_lengths[i]]
    if not live:
        return empty
    q_live, kv_live = ([lengths[i] for i in live] for lengths in (q_lengths, kv_lengths))
    is_packed = layout == "TND"
    tensors = (
        torch.cat([x[i, : lengths[i]] for i in live]) if is_packed else laid_out(x, "SBH")
        for x, lengths in ((query, q_lengths), (key, kv_lengths), (value, kv_lengths))
    )
    out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(
        *tensors,
        heads,
        layout,
        atten_mask=triangle(query.device) if is_causal else None,
        scale=scale,
        actual_seq_qlen=ends(q_live) if is_packed else None,
        actual_seq_kvlen=ends(kv_live) if is_packed else None,
        sparse_mode=3 if is_causal else 0,
    )
    if not is_packed:
        statistics = (x[..., 0].transpose(1, 2) for x in (maximum, total))
        new = Carried(tokens_first(out, "SBH", heads), *statistics)
    else:
        statistics = (from_sequence_order(x, q_live)[..., 0] for x in (maximum, total))
        packed = Carried(out, *statistics)
        new = Carried(*(x.clone() for x in empty))
        for result, tokens in zip(new, packed, strict=True):
            for i, part in zip(live, tokens.split(q_live), strict=True):
                result[i, : len(part)] = part
    return _where(saw_a_key(query, is_causal, q_lengths, kv_lengths), new, empty)


def fusion_update(previous: Carried, current: Carried, *, layout: Layout = "TND") -> Carried:
    """The partial over the keys of both; one call of npu::npu_ring_attention_update.

    Args:
      previous, current: of the same queries, over disjoint sets of keys.
      layout: how they go to the operator; TND takes V a multiple of 64 up to 768.

    Raises:
      InputError: what the operator cannot express.
    """
    _check_update(previous, current, layout)
    vendor.require("npu::npu_ring_attention_update", previous.out.device)
    batch, length, heads, _ = previous.out.shape
    # −inf − (−inf) is NaN in the operator. (−3.4e38, 1) weighs nothing beside a score, and is not NaN beside itself.
    lowest = torch.finfo(torch.float32).min
    sides = []
    for side in (previous, current):
        seen = side.total > 0
        finite = Carried(side.out, torch.where(seen, side.maximum, lowest), torch.where(seen, side.total, 1))
        sides += _stored(finite, layout)
    out, maximum, total = torch.ops.npu.npu_ring_attention_update(
        *sides,
        actual_seq_qlen=torch.tensor([0, *ends([length] * batch)]).to(previous.out.device) if layout == "TND" else None,
        input_layout=layout,
    )
    if layout == "TND":
        lengths = [length] * batch
        statistics = (from_sequence_order(x, lengths)[..., 0].unflatten(0, (batch, length)) for x in (maximum, total))
        merged = Carried(out.unflatten(0, (batch, length)), *statistics)
    else:
        merged = Carried(tokens_first(out, "SBH", heads), *(x[..., 0].transpose(1, 2) for x in (maximum, total)))
    seen = (previous.total > 0) | (current.total > 0)
    return _where(seen, merged, _empty(previous.out, previous.out.shape[3]))


def _stored(side: Carried, layout: Layout) -> tuple[Tensor, ...]:
    """Out, maximum and sum as the operator takes them."""
    copies = [x[..., None].expand(*x.shape, COPIES) for x in side[1:]]
    if layout == "SBH":
        return laid_out(side.out, "SBH"), *(x.transpose(1, 2).contiguous() for x in copies)
    lengths = [side.out.shape[1]] * side.out.shape[0]
    return side.out.flatten(0, 1).contiguous(), *(to_sequence_order(x.flatten(0, 1), lengths) for x in copies)


def _empty(query: Tensor, width: int) -> Carried:
    shape = query.shape[:3]
    statistics = (query.new_full(shape, fill, dtype=torch.float32) for fill in (-torch.inf, 0))
    return Carried(query.new_zeros(*shape, width), *statistics)


def _where(rows: Tensor, a: Carried, b: Carried) -> Carried:
    return Carried(
        torch.where(rows[..., None], a.out, b.out),
        *(torch.where(rows, x, y) for x, y in zip(a[1:], b[1:], strict=True)),
    )


@functools.cache
def triangle(device: torch.device) -> Tensor:
    """True where a key is hidden, whatever the lengths."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def check_fusion_block(
    query: Tensor, key: Tensor, value: Tensor, scale: float,
    q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], layout: Layout,
) -> None:  # fmt: skip
    """Raises InputError for what the operator and its gradient cannot express."""
    check_block(query, key, value, scale, q_lengths, kv_lengths, (torch.float16, torch.bfloat16, torch.float32))
    width, v_width = key.shape[3], value.shape[3]
    if not 1 <= v_width <= width <= 768:
        raise InputError(f"head dims {width} and {v_width}; the operator takes 1 ≤ V ≤ H ≤ 768")
    if layout not in ("SBH", "TND"):
        raise InputError(f"layout {layout!r} is neither SBH nor TND")
    if layout == "SBH" and (set(q_lengths), set(kv_lengths)) != ({query.shape[1]}, {key.shape[1]}):
        raise InputError(f"lengths {q_lengths} and {kv_lengths} leave pads; layout SBH has no lengths: use TND")


def _check_update(previous: Carried, current: Carried, layout: Layout) -> None:
    shape, dtype = previous.out.shape, previous.out.dtype
    if layout not in ("SBH", "TND"):
        raise InputError(f"layout {layout!r} is neither SBH nor TND")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32) or current.out.dtype != dtype:
        raise InputError(f"outs are {dtype} and {current.out.dtype}; both must be float16, bfloat16 or float32")
    for name, side in (("previous", previous), ("current", current)):
        fits = len(shape) == 4 and side.out.shape == shape and side.maximum.shape == side.total.shape == shape[:3]
        if not fits or side.maximum.dtype != torch.float32 or side.total.dtype != torch.float32:
            raise InputError(
                f"{name} has {[(tuple(x.shape), x.dtype) for x in side]}; it must be of {tuple(shape)} and, twice, "
                f"{tuple(shape[:3])} float32"
            )
        # NaN must not look like "no key".
        if not bool(((side.total >= 0) & (side.total < torch.inf) & (side.maximum < torch.inf)).all()):
            raise InputError(f"{name} has a maximum or a total that is infinite, negative or NaN")
    if layout == "TND" and (shape[3] % 64 or not 64 <= shape[3] <= 768 or shape[2] > 256):
        raise InputError(
            f"{shape[2]} heads of {shape[3]}; layout TND takes 256 and a multiple of 64 up to 768: use SBH"
        )
