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
    exchange/                               how keys meet queries: ring, all-gather, pass-query, all-to-all, …
    parallel, decode, latent, module        global arrays in and out; a KV cache cut by tokens; MLA; a Flax layer
    crosscheck/                             the instrument: cases, the judge, the diagnosis; needs no JAX
    mindie/                                 a MindIE deployment: checked, explained, and its case
    trial/                                  the judge on trial
    cli                                     the command

Nothing is imported or chosen here, so `import cpjax` costs nothing.
"""
