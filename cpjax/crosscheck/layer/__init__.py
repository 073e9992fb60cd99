"""A whole decoder layer of DeepSeek judged stage by stage: which stage is wrong, of which kind, where. No JAX.

Read in this order; a file imports only what stands above it:

    shape       the linear weights of a layer; which tensors a case and a result have
    case        a case file: config, weights, hidden state (docs/formats.md)
    result      a result file: what every stage gave
    stages      the stages in order, the inputs of each
    weights     a linear weight as it is stored, unpacked
    expected    an exact value, and how far correct float32 arithmetic may be from it
    formulas    every stage in float64, from the formulas; each with the faults that are known
    gating      the router's choice, with its ties
    computed    what each stage should give, from its inputs
    lattice     the test: which numbers are not the rounding of the exact value, and how many may be
    verdict     the verdict on one stage and on a layer
    places      where a stage is wrong: tokens, columns, heads, experts
    causes      known faults that reproduce a wrong stage within its bound
    judge       the verdict on a result
    chain       the whole layer in float64, from the hidden state: what cases are made with
    session     folders of cases and results
    table       verdicts as tables and sentences

Each stage is judged from the result's own earlier tensors, so a wrong stage is named alone (docs/verdict.md, §12).
"""
