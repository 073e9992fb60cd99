"""Kernels of a GPU on trial: forward, backward, long problems, and faults planted in their results.

    card         is there a CUDA device; which, and which versions of what runs on it
    fused        PyTorch's kernels by name, with their lse, on tensors `[B, N, T, H]`
    triton_flash a user's kernel: FlashAttention-2's forward pass in Triton, written from scratch
    compiled     kernels that are compiled for each shape: flex_attention, jax.nn
    kernels      the table of them: who takes what, and what an honest user says of it
    problems     what is asked of them
    planted      wrong results, made by calling the same kernel wrongly
    tasks        which problem goes to which kernel, numbered
    compute      a task's result, as NumPy arrays; the only file that calls a kernel
    judging      the judge's answer to one result; runs in processes that never touch CUDA
    run          both at once, until the clock ends it
    report       JSON, a table, and the arrays of a few alarms

`python -m cpjax.trial cuda --folder DIR`; docs/trial.md says more.
"""
