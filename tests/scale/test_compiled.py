"""Rings compiled by the real TPU compiler: what they send, when, and to whom. No TPU is needed, but libtpu is.

The laws hold for a ring that is unrolled and for one that is a loop: instructions are multiplied with their runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Not among the packages of the environment: where libtpu is found, every process with JAX looks for a TPU, and prints.
LIBTPU = Path(os.environ.get("CPJAX_LIBTPU", ROOT / ".venv" / "tpu"))
CP, HEADS, DIM, LATENT, ROPE = 4, 2, 64, 32, 16


def cpjax_inspect(*arguments):
    if not (LIBTPU / "libtpu").exists():
        message = f"NOT TESTED: no libtpu in {LIBTPU.name}/; `make test` installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    shape = ("--heads", HEADS, "--head-dim", DIM, "--value-dim", DIM, "--dtype", "float32")
    line = [sys.executable, "-m", "cpjax", "inspect", "--topology", "v5e:2x2", "--json", *shape, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(LIBTPU))), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([*map(str, line)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.strip().splitlines()) == 1, "more on stderr than the progress bar"
    return json.loads(run.stdout)


# Each is compiled once, which takes 5 to 30 CPU seconds.
@pytest.fixture(scope="module")
def forward():
    return cpjax_inspect("--tokens", 4096)


@pytest.fixture(scope="module")
def backward():
    return cpjax_inspect("--tokens", 1024, "--backward", "--in-partition-order")


@pytest.fixture(scope="module")
def latent():
    return cpjax_inspect("--tokens", 1024, "--latent", "--latent-dim", LATENT, "--rope-dim", ROPE)


@pytest.fixture(scope="module")
def splash():
    heads = ("--head-dim", 192, "--value-dim", 128, "--dtype", "bfloat16")
    return cpjax_inspect("--tokens", 1024, "--in-partition-order", "--attend", "splash", *heads)


def sent(transfers):
    return sum(x["bytes"] * x["runs"] for x in transfers)


def places(tokens):
    """Position and segment of a shard's tokens travel with it."""
    return 2 * 4 * tokens // CP


@pytest.mark.parametrize("name", ["forward", "backward", "latent", "splash"])
def test_there_is_no_collective_but_permutes(name, request):
    said = request.getfixturevalue(name)
    assert set(said["collectives"]) == {"collective-permute"}
    assert said["collectives"]["collective-permute"] == len({x["name"] for x in said["transfers"]})


@pytest.mark.parametrize("name", ["forward", "backward", "latent", "splash"])
def test_every_transfer_is_asynchronous(name, request):
    assert all(x["asynchronous"] for x in request.getfixturevalue(name)["transfers"])


def test_the_ring_sends_each_shard_once_to_every_other_rank(forward):
    ring = [x for x in forward["transfers"] if x["sender"] == "ring"]
    shard = 2 * 4 * HEADS * DIM * 4096 // CP + places(4096)
    assert sent(ring) == (CP - 1) * shard


def test_the_ring_goes_from_neighbour_to_neighbour(forward):
    assert {x["hops"] for x in forward["transfers"] if x["sender"] == "ring"} == {1}


def test_keys_and_values_travel_while_attention_is_computed(forward):
    large = [x for x in forward["transfers"] if x["sender"] == "ring" and x["bytes"] > places(4096)]
    assert sum(x["runs"] for x in large) >= CP - 1
    for transfer in large:
        assert transfer["encloses_attention"]
        assert any(work["multiplies"] and work["kind"] == "loop" for work in transfer["encloses"])
        assert transfer["cycles_enclosed"] > transfer["link_cycles"]


def test_tokens_are_moved_into_shards_by_no_more_than_their_bytes(forward):
    """Half a shard changes its rank, in two pieces at most; of queries, keys, values, and of the result."""
    moving = [x for x in forward["transfers"] if x["sender"] == "moving"]
    shard = 4 * HEADS * DIM * 4096 // CP
    assert 0 < sent(moving) <= 4 * shard + 4 * HEADS * 4096 // CP


def test_derivatives_travel_and_shards_at_most_once_more(backward):
    """Of a ring that is unrolled, XLA sees that the same shards would travel twice, and keeps them instead."""
    arrays = 2 * 4 * HEADS * DIM * 1024 // CP
    shard = arrays + places(1024)
    there = [x for x in backward["transfers"] if x["sender"] == "exchange"]
    back = [x for x in backward["transfers"] if x["sender"] == "exchange, backwards"]
    assert len(there) + len(back) == len(backward["transfers"])
    assert sent(there) == (CP - 1) * shard
    assert (CP - 1) * arrays <= sent(back) <= (CP - 1) * shard + CP * arrays


def test_of_a_latent_only_the_latent_travels(latent):
    shard = 4 * (LATENT + ROPE) * 1024 // CP + places(1024)
    assert sent(latent["transfers"]) == (CP - 1) * shard


def test_splash_is_compiled_inside_the_ring(splash):
    """Of bfloat16 at 192/128: each shard is sent once to every other rank, in the loop while kernels compute."""
    shard = 2 * HEADS * (192 + 128) * 1024 // CP + places(1024)
    assert sent(splash["transfers"]) == (CP - 1) * shard
    assert splash["kernels"] > 0
    (loop,) = (x for x in splash["loops"] if x["products"])
    assert loop["trips"] == CP - 2
    inside = [x for x in splash["transfers"] if x["runs"] == loop["trips"]]
    assert sum(x["bytes"] for x in inside) == shard
    for transfer in inside:
        assert transfer["encloses_attention"]
        assert {work["kind"] for work in transfer["encloses"] if work["multiplies"]} <= {"kernel", "conditional"}


def test_memory_per_chip_is_that_of_its_shards(forward):
    arrays = 4 * HEADS * DIM * 4096 // CP
    assert forward["memory_bytes"]["arguments"] == 3 * arrays
    assert forward["memory_bytes"]["results"] < 1.1 * (arrays + 4 * HEADS * 4096 // CP)
    assert forward["peak_bytes"] > 0
    assert forward["compile_seconds"] > 0


def test_loops_turn_as_often_as_there_are_tiles(forward):
    """Queries are computed 256 at a time: four tiles of a shard, in whatever loop they stand."""
    tiles = [x for x in forward["loops"] if x["products"] and x["trips"] == 4096 // CP // 256]
    assert tiles
    assert all(x["trips"] is not None for x in forward["loops"])
