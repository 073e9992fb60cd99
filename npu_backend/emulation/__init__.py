"""CPU kernels for the vendor's operators; one file per operator; those of attention over one
FlashAttention loop (flash.py), those of quantised layers over integers.py."""

from collections.abc import Callable
from typing import Any

from npu_backend.emulation.attention_update import npu_attention_update
from npu_backend.emulation.autograd import autograd_kernel
from npu_backend.emulation.dynamic_quant import npu_dynamic_quant
from npu_backend.emulation.fused_infer import (
    npu_fused_infer_attention_score,
    npu_fused_infer_attention_score_get_max_workspace,
    npu_fused_infer_attention_score_out,
    npu_fused_infer_attention_score_v2,
    npu_fused_infer_attention_score_v2_get_max_workspace,
    npu_fused_infer_attention_score_v2_out,
)
from npu_backend.emulation.fusion import npu_fusion_attention
from npu_backend.emulation.fusion_grad import npu_fusion_attention_grad
from npu_backend.emulation.fusion_versions import (
    npu_fusion_attention_grad_v2,
    npu_fusion_attention_grad_v3,
    npu_fusion_attention_v2,
    npu_fusion_attention_v3,
)
from npu_backend.emulation.gather_pa_kv_cache import npu_gather_pa_kv_cache, npu_gather_pa_kv_cache_functional
from npu_backend.emulation.grouped_matmul import npu_grouped_matmul
from npu_backend.emulation.interleave_rope import npu_interleave_rope
from npu_backend.emulation.kv_rmsnorm_rope_cache import npu_kv_rmsnorm_rope_cache
from npu_backend.emulation.latent import (
    npu_multi_head_latent_attention,
    npu_multi_head_latent_attention_lse,
    npu_multi_head_latent_attention_lse_out,
    npu_multi_head_latent_attention_out,
)
from npu_backend.emulation.mode import arithmetic
from npu_backend.emulation.moe_finalize_routing import npu_moe_finalize_routing
from npu_backend.emulation.moe_gating_top_k import npu_moe_gating_top_k
from npu_backend.emulation.moe_init_routing import npu_moe_init_routing_v2
from npu_backend.emulation.paged_cache_load import npu_paged_cache_load, npu_paged_cache_load_out
from npu_backend.emulation.quant_matmul import npu_quant_matmul
from npu_backend.emulation.quantize import npu_quantize
from npu_backend.emulation.ring_attention_update import npu_ring_attention_update
from npu_backend.emulation.ring_mla import npu_ring_mla, npu_ring_mla_out
from npu_backend.emulation.rms_norm import npu_add_rms_norm, npu_rms_norm
from npu_backend.emulation.swiglu import npu_swiglu

__all__ = ["KERNELS", "arithmetic", "autograd_kernel"]

KERNELS: dict[str, Callable[..., Any]] = {
    "atb::npu_ring_mla": npu_ring_mla,
    "atb::npu_ring_mla.out": npu_ring_mla_out,
    "atb::npu_paged_cache_load": npu_paged_cache_load,
    "atb::npu_paged_cache_load.out": npu_paged_cache_load_out,
    "atb::npu_multi_head_latent_attention": npu_multi_head_latent_attention,
    "atb::npu_multi_head_latent_attention.out": npu_multi_head_latent_attention_out,
    "atb::npu_multi_head_latent_attention.lse": npu_multi_head_latent_attention_lse,
    "atb::npu_multi_head_latent_attention.lse_out": npu_multi_head_latent_attention_lse_out,
    "npu::npu_gather_pa_kv_cache": npu_gather_pa_kv_cache,
    "npu::npu_gather_pa_kv_cache_functional": npu_gather_pa_kv_cache_functional,
    "npu::npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu::npu_fused_infer_attention_score.out": npu_fused_infer_attention_score_out,
    "npu::_npu_fused_infer_attention_score_get_max_workspace": npu_fused_infer_attention_score_get_max_workspace,
    "npu::npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
    "npu::npu_fused_infer_attention_score_v2.out": npu_fused_infer_attention_score_v2_out,
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": npu_fused_infer_attention_score_v2_get_max_workspace,
    "npu::npu_attention_update": npu_attention_update,
    "npu::npu_fusion_attention": npu_fusion_attention,
    "npu::npu_fusion_attention_grad": npu_fusion_attention_grad,
    "npu::npu_fusion_attention_v2": npu_fusion_attention_v2,
    "npu::npu_fusion_attention_grad_v2": npu_fusion_attention_grad_v2,
    "npu::npu_fusion_attention_v3": npu_fusion_attention_v3,
    "npu::npu_fusion_attention_grad_v3": npu_fusion_attention_grad_v3,
    "npu::npu_ring_attention_update": npu_ring_attention_update,
    "npu::npu_rms_norm": npu_rms_norm,
    "npu::npu_add_rms_norm": npu_add_rms_norm,
    "npu::npu_interleave_rope": npu_interleave_rope,
    "npu::npu_kv_rmsnorm_rope_cache": npu_kv_rmsnorm_rope_cache,
    "npu::npu_quantize": npu_quantize,
    "npu::npu_dynamic_quant": npu_dynamic_quant,
    "npu::npu_quant_matmul": npu_quant_matmul,
    "npu::npu_swiglu": npu_swiglu,
    "npu::npu_moe_gating_top_k": npu_moe_gating_top_k,
    "npu::npu_moe_init_routing_v2": npu_moe_init_routing_v2,
    "npu::npu_grouped_matmul": npu_grouped_matmul,
    "npu::npu_moe_finalize_routing": npu_moe_finalize_routing,
}
"""By the operator's full name. vendor.py registers them."""
