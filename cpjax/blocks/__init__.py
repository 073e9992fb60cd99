"""What one device computes of one block.

tiles            attention in tiles, as FlashAttention-2 does it: the definition
tiles_backward   its derivative
varying          types of arrays inside `jax.shard_map`
runs             a block of runs of the text, for kernels whose masks are compiled into them
splash           JAX's kernel for TPUs
cudnn            cuDNN's for GPUs of NVIDIA
chosen           all of them by name, and what each cannot compute
"""
