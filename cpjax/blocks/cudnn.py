"""The block as cuDNN's fused attention for GPUs of NVIDIA, which JAX calls.

It computes scores, maximum and sum in float32, and rounds probabilities and `out` to the dtype of its inputs: so says
the card of cuDNN's kernel on an H200 (docs/fingerprint.md). It is handed scale · query, for cuDNN's own scale is a
constant, and ours is an operand of the compiled program: profiles `scaled_query_fp16` and `scaled_query_bf16`.

This block was never run, for there was no GPU; a test lowers it for CUDA.
"""

from typing import Any

from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.runs import attend_runs
from cpjax.mask import Tokens
from cpjax.partial import Partial


def attend_cudnn(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
) -> Partial:
    """As `cpjax.blocks.runs.attend_runs`, in float16 or bfloat16. Inside a `shard_map` it needs `check_vma=False`.

    Raises:
      RuntimeError: JAX finds no cuDNN.
      NotImplementedError: what JAX knows that this GPU's cuDNN cannot do, as heads of more than 128 before Hopper.
    """
    return attend_runs(query, key, value, q_tokens, kv_tokens, attention, _kernel)


def _kernel(
    query: Float[Array, "B s N H"], key: Float[Array, "B s K H"], value: Float[Array, "B s K V"], is_causal: bool
) -> tuple[Float[Array, "B s N V"], Float[Array, "B s N"]]:
    # Not jax.nn.dot_product_attention(implementation="cudnn", return_residual=True), which calls this function: that
    # rounds lse to the dtype of the inputs, and a weight e^lse from an lse of 10 in bfloat16 is wrong by up to 3 %. It
    # also refuses values of another head size than the keys'.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.CAUSAL if is_causal else fused.MaskType.NO_MASK
    found: Any = fused.dot_product_attention(query, key, value, scale=1.0, mask_type=mask, return_residual=True)
    out, lse = found
    return out, lse.swapaxes(1, 2)
