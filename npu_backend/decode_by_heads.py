"""vLLM-Ascend's exchange of decode: each rank merges its share of the heads.

    every rank       out and lse of all heads over its own tokens, both as float32 in one tensor [N, V + 1, T]
    all-to-all       of the heads: rank r gets its N/cp heads from everybody
    every rank       npu_attention_update of cp float32 partials, in the order of the ranks; out to FP16
    at last          all heads to all ranks, only because a result of this backend holds them

Source: `_process_attn_out_lse` and `_npu_attention_update` of vllm_ascend/attention/context_parallel/common_cp.py,
commit 0170adde6795. It calls update_type 0, which gives no lse; a result needs it, so here it is update_type 1, which
gives the same out. Not modelled: its newer fused operator dcp_a2a_fused, whose kernel we have not read; and that of
several new tokens it computes the new ones apart from the cached ones.
"""

import torch
from torch import Tensor

from npu_backend.errors import RankError
from npu_backend.exchange import Held, Link
from npu_backend.families import merge_all
from npu_backend.operators import Partial


def exchange_by_heads(link: Link, mine: Partial, tags: list[Tensor]) -> Partial:
    """All heads, merged over the tokens of all ranks, from this rank's `[T, 1, N, V]` of them.

    Args:
      link: to the others; the number of heads is a multiple of its cp.
      mine: (out, lse) over this rank's tokens; lse −inf without any.
      tags: by rank, what its partial must come with.

    Raises:
      RankError: a partial of another case, of another rank, or over other tokens than the rank's.
      LinkError: the exchange failed.
    """
    joined = torch.cat([mine.out.float(), mine.lse[..., None]], dim=-1)[:, 0].permute(1, 2, 0)
    parts = [Held((x,), tags[link.rank]) for x in joined.chunk(link.cp)]
    arrived = link.deal(parts) if link.cp > 1 else parts
    check_tags(arrived, tags)
    partials = []
    for (x,), _ in arrived:
        by_token = x.permute(2, 0, 1)[:, None]
        partials.append(Partial(by_token[..., :-1].contiguous(), by_token[..., -1].contiguous()))
    merged = merge_all(tuple(partials))
    share = Held((merged.out.to(mine.out.dtype), merged.lse), tags[link.rank])
    shares = link.gather(share) if link.cp > 1 else [share]
    check_tags(shares, tags)
    return Partial(*(torch.cat(x, dim=2) for x in zip(*(rows for rows, _ in shares), strict=True)))


def check_tags(arrived: list[Held], tags: list[Tensor]) -> None:
    """That what arrived in the place of each rank is its own, over the tokens that it holds.

    Raises:
      RankError: it is not.
    """
    for sender, ((_, found), wanted) in enumerate(zip(arrived, tags, strict=True)):
        if not torch.equal(found, wanted):
            raise RankError(
                f"step 0: a wrong partial; in the place of rank {sender} is rank {int(found[0])}'s, which saw "
                f"{found[1:].tolist()} tokens and not {wanted[1:].tolist()}"
            )
