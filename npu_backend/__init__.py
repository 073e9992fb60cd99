"""Context-parallel attention on Atlas NPUs, in PyTorch; and the same lines on any CPU.

One process per rank. Each rank holds two chunks of the sequence (zigzag), computes its queries against the keys and
values it holds, and passes those on to the next rank, until every block has been everywhere it is needed. Each pair
of chunks is one call of the vendor's operator `torch.ops.atb.npu_ring_mla`, which carries the result so far. On `npu`
tensors that is the vendor's kernel; on `cpu` tensors it is a kernel of ours, registered for the very same operator,
that keeps its contract and its roundings. So there is one code path, and a laptop tests it.

Read in this order; each file imports only files above it:

    schedule.py         integers: which pair of chunks rank r computes at which step of which exchange
    files.py            a case comes in, a result goes out (docs/formats.md)
    schemas.py          the vendor's operators as torch_npu declares them
    contracts/          what each of them accepts and refuses
    emulation/          each of them on a CPU, with the roundings of the vendor's kernel
    vendor.py           the operators by name: torch_npu's where it is installed, declared by us where it is not
    operators/          the operators in our words and shapes
    families.py         three ways of folding blocks with them
    packing.py          several requests in one row: index arrays
    shard.py            what a rank holds of a case
    exchange.py         how what the ranks hold travels: ring, gather, double ring
    prefix.py           cached prefixes: who holds which blocks
    latent.py           keys and values that are made of a latent, where it has arrived
    ring.py             the algorithm, for one rank
    ring_backward.py    its derivative, for the fusion operators
    decode.py           a KV cache cut by tokens: partials per rank, exchanged and merged
    decode_by_heads.py  the same as vLLM-Ascend does it
    profile.py          how much of the transfers was hidden
    provenance.py       what computed
    rank.py             one rank, one case: read, compute, join, write
    workers.py          the ranks as processes of this host
    runner.py           many cases, resumed where they were left; `python -m npu_backend run`
    layer/              a whole decoder layer on one device, stage by stage; `python -m npu_backend layer`

Nothing here imports `cpjax`: the two halves implement the same algorithm independently and meet only in files.
Importing this package makes `torch.ops.atb.npu_ring_mla` and the others callable on CPU tensors. It needs Python 3.11
and torch 2.13.0 at least (docs/operators.md). `sdk/` is for those who develop this: the real torch_npu without an NPU.
"""

import sys

try:
    from npu_backend import autoload, vendor
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    needs = 'npu_backend needs torch, which is not installed; install it: pip install "torch>=2.13"'
    if sys.argv[:1] == ["-m"]:  # `python -m npu_backend`: the interpreter imports the package before it runs it
        print(needs, file=sys.stderr)
        raise SystemExit(2) from None
    raise ModuleNotFoundError(needs, name="torch") from None

__all__ = ["autoload", "vendor"]
