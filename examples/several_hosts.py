"""Context-parallel attention over several processes, one on each host; every process holds its own tokens only.

On each host, with another --rank:

    python several_hosts.py --coordinator host0:1234 --processes 4 --rank 0 --tokens 8192

On GPUs and TPUs each process has the devices of its host. On a CPU it has one (--devices says how many), and gloo
carries what travels. Rank 0 prints the seconds of three runs, and the verdict on all rows of the result.
"""

import argparse
import time

import jax
import numpy as np

HEADS, DIM = 4, 64


def tokens_of(start: int, stop: int) -> list[np.ndarray]:
    """Query, key and value `[1, stop − start, N, H]` of these tokens in float16, as a model would compute them here."""
    rows = [np.random.default_rng(token).standard_normal((3, HEADS, DIM)) for token in range(start, stop)]
    return [x[None].astype(np.float16) for x in np.stack(rows, axis=1)]


def main() -> int:
    """Compute, time and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT of rank 0; any free port")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1, help="of this process; on a CPU only")
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", given.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(given.coordinator, given.processes, given.rank)
    from jax.experimental.multihost_utils import process_allgather

    from cpjax.crosscheck import judge
    from cpjax.parallel import context_parallel_attention, cp_mesh

    mesh = cp_mesh(jax.device_count())
    sharded = jax.NamedSharding(mesh, jax.P(None, "cp"))
    length = given.tokens // given.processes
    own = tokens_of(given.rank * length, (given.rank + 1) * length)
    arrays = [jax.make_array_from_process_local_data(sharded, x) for x in own]
    attention = jax.jit(lambda q, k, v: context_parallel_attention(q, k, v, mesh=mesh))
    jax.block_until_ready(attention(*arrays))  # compiles
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = jax.block_until_ready(attention(*arrays))
        seconds.append(time.perf_counter() - start)

    # Only to judge are all tokens brought together.
    whole = [process_allgather(x, tiled=True) for x in (*arrays, *result)]
    passed = True
    if given.rank == 0:
        verdict = judge(*whole, is_causal=True, scale=DIM**-0.5, cp=mesh.size, partition="zigzag", order="ring")
        passed = verdict.passed
        print(f"{given.processes} processes, {mesh.size} devices, {given.tokens:,} tokens")
        print(f"seconds: {', '.join(f'{x:.3f}' for x in seconds)}")
        print("passed" if passed else "\n".join(verdict.reasons))
    jax.distributed.shutdown()
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
