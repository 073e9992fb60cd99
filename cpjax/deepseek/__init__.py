"""DeepSeek-V3 and R1, from config.json to tokens, on one device or under context parallelism.

Read in this order; a file imports only what stands above it:

    config        config.json as one value: shapes, YaRN, softmax scale; no JAX
    rope          angles, and the rotation of pairs
    matrix        a weight that is no array but knows its own product
    attention     a layer's projections: hidden state → query and latent; what was attended → hidden state
    moe           gate, up, down; the router; experts
    model         layers to logits; what attends is handed in
    mtp           the module that drafts one more token
    names         the checkpoint's tensors: names, shapes, dtypes, and how ranks cut them
    description   a quantised checkpoint's own word: which tensor is quantised, in which way
    sources       which tensors an array comes from
    checkpoint    sharded safetensors: each device reads its slice; a random one is written
    layout        several requests' new tokens in a prefill: a row each, or all packed in one row
    cache         latents of past tokens, cut over the ranks of cp, or of cp and tp
    parallel      prefill with tokens in zigzag over cp, heads over tp, experts over both; decode; on a mesh
    draft         tokens that MTP modules guess, and what of them is accepted
    handover      the cache of a prefill instance, fetched by a decode instance
    generate      greedy decoding
    logit_error   what rounding in attention may do to a logit: a standard deviation, from drawn roundings
    one_device    the same text on one device, as a check
    ahead         decoding in which steps are started before the host has read the last one's tokens
    simulate      what `cpjax generate` does
    module        the weights as Flax NNX modules that bear the checkpoint's names

Beside them, for layers with quantised weights; the first four stand below `attention`:

    quantized             what is stored; activations as integers; integer products
    quantized_linear      from integers to numbers, exactly or as the vendor's hardware does
    quantized_cut         what a rank of tp holds
    quantized_matrix      a quantised weight in the place of a matrix: arithmetic, and the axis of tp
    quantizers            quantised weights made of float ones
    watched               weights that tell what they are given
    calibration           ranges of what goes into static layers
    quantized_checkpoint  a random quantised checkpoint, as the vendor's tool writes it
    layer_cases           small cases of one layer, for the judge of layers (`cpjax.crosscheck.layer`)
    quantized_ties        activations so near to a tie that two exact computations may differ

Everything is computed in one dtype, float64 or float32, but attention: that has a profile (`cpjax.precision`).
"""
