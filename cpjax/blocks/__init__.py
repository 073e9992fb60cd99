"""What one device computes of one block: attention in tiles, as FlashAttention-2 does it, and its backward pass."""
