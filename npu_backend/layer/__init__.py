"""One whole decoder layer of DeepSeek-V3, stage by stage, on the vendor's operators: `python -m npu_backend layer`.

A case has the layer's weights and hidden states, a result what every stage has made of what the stage before gave
(docs/formats.md). So each stage is judged by itself. Read in this order; each file imports only files above it:

    config.py           what config.json says of a layer, and what no operator takes
    weights.py          which tensors a case has, of which kind
    case.py             a case comes in
    linear.py           a linear layer of any kind: floats, W8A8, W8A8 with a scale a token, W4A8
    angles.py           cosines and sines of positions
    attention.py        stages from the hidden states to the sum behind attention
    feed_forward.py     stages of a dense layer, and of shared experts
    experts.py          stages of routed experts
    run.py              a case computed; many cases; results go out

One device, one request, causal. Attention is npu_ring_mla in its only call: nothing is merged.
"""
