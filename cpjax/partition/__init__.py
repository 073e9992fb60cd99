"""Who holds which tokens, and in which order chunks are merged. Integers only; no JAX.

layout, packing         one request, or several in one row: a permutation of the tokens, cut into shards
schedule                which rank computes which pair of chunks when
merge_order             in which order a query chunk merges key/value chunks
packed                  the chunks of a pack with cached prefixes
kv_cache, paged         MindIE's cache blocks; the chunks of a decode step over such a cache

A new layout is a name and its branch in `layout`, and its laws in tests/spec/test_layout.py.
"""
