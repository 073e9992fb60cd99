"""The vendor's operators in our words and shapes. Layouts, masks and conventions are translated here, once.

    partial.py           Partial(out [B, t, N, V], lse [B, t, N])
    ring_mla.py          family 1, MindIE: npu_ring_mla carries out and lse from block to block
    latent.py            what surrounds it: the paged cache, and decode over the latent
    fused_infer.py       family 2, vLLM-Ascend: npu_fused_infer_attention_score per block,
    attention_update.py    npu_attention_update over all partials
    fusion.py            family 3, MindSpeed: npu_fusion_attention per block,
                           npu_ring_attention_update from block to block
    fusion_grad.py         its gradient, npu_fusion_attention_grad per block
    norms.py, rope.py      what a decoder layer needs besides: norms, rotary embedding and the latent,
    quantized.py, swiglu.py  quantised products, the activation,
    experts.py             router and experts

What an operator's contract cannot express is refused before the call. Degenerate cases keep the specification's
meaning whatever the operator does: no key gives (0, −inf), a block without keys changes nothing, +inf never leaves.
"""

from npu_backend.operators.attention_update import merge_partials
from npu_backend.operators.experts import (
    Choice,
    PackedExperts,
    Rows,
    grouped_dynamic_linear,
    grouped_linear,
    grouped_packed_linear,
    in_token_order,
    packed_linear,
    route,
    spread,
    weighted_sum,
)
from npu_backend.operators.fused_infer import fused_infer_block
from npu_backend.operators.fusion import Carried, fusion_block, fusion_update
from npu_backend.operators.fusion_grad import BlockGradients, fusion_block_backward
from npu_backend.operators.latent import latent_decode, paged_latent
from npu_backend.operators.norms import AddedNorm, add_norm, norm
from npu_backend.operators.partial import Partial
from npu_backend.operators.quantized import (
    Activations,
    dynamic_linear,
    quantize_per_token,
    quantize_static,
    static_linear,
)
from npu_backend.operators.ring_mla import ring_mla_block
from npu_backend.operators.rope import Angles, Latent, latent_of, rotate
from npu_backend.operators.swiglu import gated

__all__ = [
    "Activations",
    "AddedNorm",
    "Angles",
    "BlockGradients",
    "Carried",
    "Choice",
    "Latent",
    "PackedExperts",
    "Partial",
    "Rows",
    "add_norm",
    "dynamic_linear",
    "fused_infer_block",
    "fusion_block",
    "fusion_block_backward",
    "fusion_update",
    "gated",
    "grouped_dynamic_linear",
    "grouped_linear",
    "grouped_packed_linear",
    "in_token_order",
    "latent_decode",
    "latent_of",
    "merge_partials",
    "norm",
    "packed_linear",
    "paged_latent",
    "quantize_per_token",
    "quantize_static",
    "ring_mla_block",
    "rotate",
    "route",
    "spread",
    "static_linear",
    "weighted_sum",
]
