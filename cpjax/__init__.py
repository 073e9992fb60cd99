"""The executable specification of context-parallel attention, and the instrument that certifies a backend against it.

    Partial = (out, lse)                    attention over some of the keys
    attend(query, key, value) -> Partial    one block
    merge(a, b) -> Partial                  associative, commutative, with the identity (0, −inf)
    dense  =  attend over all keys
    ring   =  on each rank, the merge of attend over the shard that is there at step 0, 1, …, cp − 1
    ring  ==  dense, for every layout (a permutation of positions) and every mask (a predicate on positions)

Read in this order; a file imports only what stands above it:

    precision, partial, mask, attention     which quantity is rounded, (out, lse), who sees whom, all of it in one value
    layout, packing, schedule               who holds which tokens, who computes which block when: integers
    dense, tiles                            the definition in float64; one block as FlashAttention-2 computes it
    exchange/                               how keys meet queries: ring, all-gather, pass-query, all-to-all, …
    parallel, latent, module                global arrays in and out; MLA; a Flax layer
    crosscheck/                             cases, the judge, the verdict
    mindie/                                 a MindIE deployment: checked, explained, and its case
    trial/                                  the judge on trial
    cli                                     the command

Nothing is imported or chosen here, so `import cpjax` costs nothing.
"""
