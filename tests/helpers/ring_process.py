"""One process of a ring over several: `python ring_process.py RANK PROCESSES ADDRESS RESULT`."""

import sys

import jax
import numpy as np


def inputs():
    """The same on every process, and in the test."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, 16, heads, 8)).astype(np.float16) for heads in (4, 4, 4)]


def results(mesh):
    from cpjax.parallel import context_parallel_attention

    found = {}
    for exchange in ("ring", "ring_both_ways", "gather", "pass_query", "all_to_all"):
        result = context_parallel_attention(*inputs(), mesh=mesh, exchange=exchange)
        found[f"{exchange}.out"], found[f"{exchange}.lse"] = result
    loss = lambda q, k, v: context_parallel_attention(q, k, v, mesh=mesh, precision="float32").out.sum()  # noqa: E731
    found["dq"], found["dk"], found["dv"] = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs())
    return found


def main(rank: int, processes: int, address: str, result: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, rank)
    from jax.experimental.multihost_utils import process_allgather

    from cpjax.parallel import cp_mesh

    assert jax.device_count() == 2 * processes
    assert len(jax.local_devices()) == 2
    found = {name: process_allgather(x, tiled=True) for name, x in results(cp_mesh(2 * processes)).items()}
    if rank == 0:
        np.savez(result, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
