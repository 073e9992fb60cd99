"""npu::npu_fused_infer_attention_score and _v2 on a CPU.

    stage                        inner_precise 0 (high precision)      1 (high performance, FP16 only)
    q·k + q_rope·k_rope          float32                               float32, then FP16, saturating
    × scale                      float32                               FP16, saturating, scale too
    hidden scores become         −3.4e38                               −65504
    row maximum, s − m           float32                               FP16
    exp, row sum                 float32
    probabilities, times v       the dtype of the inputs
    p·v, rescaling, division     float32, then the dtype of the inputs
    lse = ln Σ + m               float32

Documented are the formats of scores and probabilities; that the steps between follow the scores' format, and that tiles
are 512 keys wide, is read from npu_ring_mla, which the vendor built of the same parts. A single query of a padded
batch, and head dim 512, are computed as under 0 whatever is asked: A2's tiling of these kernels
(incre_flash_attention_tiling.cpp) reads the flag only for quantised caches and to choose a data path, and the kernels'
scores are float32. Long decodes split the keys over cores and merge in float32, in an order that depends on the number
of cores; here they are one pass.

    rows                                           out               lse
    the mask's band shows no key; or repair asked  0                 +inf
    the mask alone shows no key, no repair         mean of values    −3.4e38
    a request without keys, one query a request    0                 −3.4e38   (incremental kernel)
    a request without keys, more queries           0                 +inf
    no keys at all (S = 0)                         0                 +inf      (V4, August 2026)
    beyond actual_seq_qlen                         0                 −inf
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.fused_infer import NAMES_OF_V1, Call, check, check_outputs
from npu_backend.contracts.layouts import laid_out
from npu_backend.contracts.sparse import Visible
from npu_backend.emulation.flash import EXACT, Hide, Stages, attend, finish, heads_first
from npu_backend.emulation.mode import is_exact

LOWEST, LOWEST_HALF = torch.finfo(torch.float32).min, torch.finfo(torch.float16).min


def npu_fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The CPU kernel of v1, which differs from v2 in names."""
    renamed = {NAMES_OF_V1.get(name, name): given for name, given in options.items()}
    return _compute(check("npu_fused_infer_attention_score", query, key, value, **renamed))


def npu_fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The CPU kernel: `out` in the output layout and the dtype of query; `lse` float32, natural logarithm.

    lse is `[B, N, S, 1]`, or `[T, N, 1]` for packed tokens; of shape `[0]` unless return_softmax_lse is set.

    Raises:
      RuntimeError: see `npu_backend.contracts.fused_infer`.
    """
    return _compute(check("npu_fused_infer_attention_score_v2", query, key, value, **options))


def npu_fused_infer_attention_score_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: list[Tensor], workspace: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """v1 into given tensors, attention_out and softmax_lse, as graph mode calls it; the workspace is not used."""
    del workspace
    results = npu_fused_infer_attention_score(query, key, value, **options)
    return _written("npu_fused_infer_attention_score.out", results, out)


def npu_fused_infer_attention_score_v2_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: list[Tensor], workspace: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """v2 into given tensors."""
    del workspace
    results = npu_fused_infer_attention_score_v2(query, key, value, **options)
    return _written("npu_fused_infer_attention_score_v2.out", results, out)


def npu_fused_infer_attention_score_get_max_workspace(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """Checks the call, as graph mode asks before it captures one. A CPU kernel needs no workspace: `[0]`."""
    renamed = {NAMES_OF_V1.get(name, name): given for name, given in options.items()}
    check("_npu_fused_infer_attention_score_get_max_workspace", query, key, value, **renamed)
    return query.new_empty(0)


def npu_fused_infer_attention_score_v2_get_max_workspace(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    """The same for v2."""
    check("_npu_fused_infer_attention_score_v2_get_max_workspace", query, key, value, **options)
    return query.new_empty(0)


@torch.no_grad()
def _written(operator: str, results: tuple[Tensor, Tensor], out: list[Tensor]) -> tuple[Tensor, Tensor]:
    check_outputs(operator, results, out)
    for given, result in zip(out, results, strict=True):
        if result.numel():  # an lse that was not asked for leaves the tensor in its place as it is
            given.copy_(result)
    return out[0], out[1]


@torch.no_grad()
def _compute(call: Call) -> tuple[Tensor, Tensor]:
    query, dtype = call.query[0], call.query[0].dtype
    out = torch.zeros(*query.shape[:-1], call.value.shape[-1], dtype=dtype)
    lse = torch.full(query.shape[:-1], -torch.inf)  # [B, S, N] or [T, N]
    start = 0
    for request, length in enumerate(call.q_lengths):
        rows = (slice(start, start + length),) if call.is_packed else (request, slice(length))
        if length:
            out[rows], lse[rows] = _request(call, request, [x[rows] for x in call.query], *_keys(call, request))
        start += length
    out = laid_out(out, call.out_layout)
    if not call.returns_lse:
        return out, torch.empty(0)
    return out, (lse if call.is_packed else lse.transpose(1, 2)).unsqueeze(-1).contiguous()


def _keys(call: Call, request: int) -> tuple[list[Tensor], Tensor]:
    """Keys, perhaps with rope, `[n, K, D]`, and values `[n, K, V]` of one request."""
    length = call.kv_lengths[request]
    if call.block_table is not None:
        blocks = call.block_table[request, : -(-length // call.value.shape[1])].long()
        *keys, value = (x[blocks].flatten(0, 1)[:length] for x in (*call.key, call.value))
    elif call.is_packed:
        start = sum(call.kv_lengths[:request])
        *keys, value = (x[start : start + length] for x in (*call.key, call.value))
    else:
        *keys, value = (x[request, :length] for x in (*call.key, call.value))
    return keys, value


def _request(call: Call, request: int, query: list[Tensor], key: list[Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """`out` `[m, N, V]` and `lse` `[m, N]` of one request."""
    rows, heads, _ = query[0].shape
    count = value.shape[0]
    if count == 0:
        return torch.zeros(rows, heads, value.shape[2]), torch.full((rows, heads), _lse_without_keys(call))
    visible = call.sparse.visible(request, rows, count)
    stages = _stages(call, value.dtype)
    q, k = (heads_first(torch.cat(parts, dim=-1)) for parts in (query, key))
    v = heads_first(value)
    columns_of = lambda block: visible.columns(block, count)  # noqa: E731
    out, lse = finish(attend(q, k, v, call.scale, stages, columns_of, _hide(visible, stages)))
    out, lse = out.transpose(0, 1), lse.transpose(0, 1)
    repaired = visible.blind(rows, count)
    if call.repairs_rows and visible.hidden is not None:
        everything = visible.hides(slice(0, rows), slice(0, count))
        repaired = repaired if everything is None else repaired | everything.all(dim=-1)
    return torch.where(repaired[:, None, None], 0, out).to(value.dtype), torch.where(
        repaired[:, None], torch.inf, lse
    ).float()


def _lse_without_keys(call: Call) -> float:
    return LOWEST if call.one_token and 0 not in call.value.shape else torch.inf


def _stages(call: Call, dtype: torch.dtype) -> Stages:
    if is_exact():
        return EXACT
    return Stages(torch.float32, torch.float16 if call.is_half_score else torch.float32, dtype, call.is_half_score)


def _hide(visible: Visible, stages: Stages) -> Hide:
    """Hidden scores are replaced, not added to."""
    low = LOWEST_HALF if stages.score == torch.float16 else LOWEST

    def hide(score: Tensor, rows: slice, columns: slice) -> Tensor:
        hidden = visible.hides(rows, columns)
        return score if hidden is None else score.masked_fill_(hidden, low)

    return hide
