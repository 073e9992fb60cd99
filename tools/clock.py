"""What a chip multiplies in a cycle, by the TPU compiler's own estimate: an upper limit of its clock. No TPU is needed.

    PYTHONPATH=.venv/tpu python tools/clock.py v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1

Each device multiplies two bfloat16 matrices of 8,192 by 8,192. Published FLOP/s over the FLOPs of a cycle would be the
clock if the estimate were of a product at full rate; it is a little slower, so the clock is at most that.
"""

import argparse

from cpjax.inspect.topology import prepare, topology

SIDE = 8192


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="+")
    names = parser.parse_args().topologies
    prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from cpjax.inspect.cycles import Cycles
    from cpjax.inspect.hlo import parse

    for name in names:
        devices = topology(name).devices
        mesh = Mesh(np.array(devices), ("x",))
        rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
        left = jax.ShapeDtypeStruct((len(devices) * SIDE, SIDE), jnp.bfloat16, sharding=rows)
        right = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16, sharding=whole)
        compiled = jax.jit(jnp.matmul, out_shardings=rows).lower(left, right).compile()
        program = parse(compiled.as_text() or "")
        cycles = Cycles(program).total(program.entry)
        print(f"{name}: {cycles:,} cycles, {2 * SIDE**3 / cycles:,.0f} FLOPs a cycle and device", flush=True)


if __name__ == "__main__":
    main()
