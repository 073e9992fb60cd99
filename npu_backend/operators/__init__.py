"""The vendor's operators in our words and shapes. Layouts, masks and conventions are translated here, once.

    partial.py           Partial(out [B, t, N, V], lse [B, t, N])
    ring_mla.py          family 1, MindIE: npu_ring_mla carries out and lse from block to block
    latent.py            what surrounds it: the paged cache, and decode over the latent
    fused_infer.py       family 2, vLLM-Ascend: npu_fused_infer_attention_score per block,
    attention_update.py    npu_attention_update over all partials
    fusion.py            family 3, MindSpeed: npu_fusion_attention per block,
                           npu_ring_attention_update from block to block
    fusion_grad.py         its gradient, npu_fusion_attention_grad per block

What an operator's contract cannot express is refused before the call. Degenerate cases keep the specification's
meaning whatever the operator does: no key gives (0, −inf), a block without keys changes nothing, +inf never leaves.
"""

from npu_backend.operators.attention_update import merge_partials
from npu_backend.operators.fused_infer import fused_infer_block
from npu_backend.operators.fusion import Carried, fusion_block, fusion_update
from npu_backend.operators.fusion_grad import BlockGradients, fusion_block_backward
from npu_backend.operators.latent import latent_decode, paged_latent
from npu_backend.operators.partial import Partial
from npu_backend.operators.ring_mla import ring_mla_block

__all__ = [
    "BlockGradients",
    "Carried",
    "Partial",
    "fused_infer_block",
    "fusion_block",
    "fusion_block_backward",
    "fusion_update",
    "latent_decode",
    "merge_partials",
    "paged_latent",
    "ring_mla_block",
]
