"""The executable specification of context-parallel attention, and the instrument that certifies a backend against it.

    Partial = (out, lse)                    attention over some of the keys
    attend(query, key, value) -> Partial    one block
    merge(a, b) -> Partial                  associative, commutative, with the identity (0, −inf)
    dense  =  attend over all keys
    ring   =  on each rank, the merge of attend over the shard that is there at step 0, 1, …, cp − 1
    ring  ==  dense, for every layout (a permutation of positions) and every mask (a predicate on positions)

Read in this order; a file imports only what stands above it (tests/project/test_imports.py):

    precision, mask, errors, arrays         which quantity is rounded, who sees whom: values, no JAX; arrays of any kind
    partition/                              who holds which tokens, in which order chunks are merged: integers
    dense, inputs                           the definition in float64; the inputs of attention, checked
    rounding, partial, attention            casts in JAX; (out, lse) and its merge; what is computed, in one value
    blocks/                                 one block as FlashAttention-2 computes it, and its gradient
    mesh                                    devices as a ring on their torus
    exchange/                               how keys meet queries: ring, all-gather, pass-query, all-to-all, …
    parallel, decode, latent, module        global arrays in and out; a KV cache cut by tokens; MLA; a Flax layer
    crosscheck/                             the instrument: cases, the judge, the diagnosis; needs no JAX
    inspect/                                what the TPU compiler makes of it: transfers, overlap, memory per chip
    testing                                 the judge as an assertion, for the tests of other projects
    mindie/                                 a MindIE deployment: checked, explained, and its case
    plan/                                   what context parallelism would gain: a cost model
    trial/                                  the judge on trial
    cli                                     the command

The names below are the public ones. `import cpjax` imports none of them: each is loaded when it is first asked for.
"""

import importlib
from typing import Any

_WHERE = {
    "cpjax.errors": ("InputError",),
    "cpjax.mask": ("Mask", "Tokens", "tokens"),
    "cpjax.precision": ("PROFILES", "Precision", "profile"),
    "cpjax.partition": (
        *("SEQUENCES", "PARTITIONS", "Partition", "SequencePartition", "partition_of", "sequence_of"),
        *("Contiguous", "Zigzag", "Striped", "Packed", "Blocks", "Interleaved", "Pages"),
    ),
    "cpjax.partition.packing": ("pack", "unpack", "packed_order", "packed_tokens"),
    "cpjax.dense": ("dense_attention",),
    "cpjax.partial": ("Partial", "merge"),
    "cpjax.attention": ("Attention", "Computation"),
    "cpjax.exchange.device": ("EXCHANGES", "attention_on_device"),
    "cpjax.parallel": ("context_parallel_attention", "cp_mesh"),
    "cpjax.decode": ("context_parallel_decode",),
    "cpjax.latent": ("latent_attention_on_device",),
    "cpjax.module": ("ContextParallelAttention", "attention_fn"),
    "cpjax.crosscheck": ("judge", "judge_gradients"),
}
"""Module → public names in it. The stub beside this file says the same to type checkers."""

_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = list(_MODULE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A public name, loaded now (PEP 562)."""
    if name not in _MODULE:
        raise AttributeError(f"module 'cpjax' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULE[name]), name)
    return found


def __dir__() -> list[str]:
    """The public names, too."""
    return sorted({*globals(), *_MODULE})
