"""One machine for all tests: eight simulated devices, hypothesis profiles, and strict dtypes."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import fast_checks
import jax
import pytest
import quick_compile
from hypothesis import HealthCheck, Phase, settings

fast_checks.install()  # before cpjax is first imported
jax.config.update("jax_num_cpu_devices", 8)  # before JAX is first used
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
quick_compile.install()

# Data is drawn freely, shapes from grids: a new shape costs a compilation, which a deadline would take for slowness.
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
# For `make check`, between two edits: whether a law holds at all, not in which corner it breaks. (Of parameters two.)
settings.register_profile("check", parent=settings.get_profile("ci"), max_examples=4)
settings.register_profile("dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", parent=settings.get_profile("dev"), max_examples=1000)
# For a mutant it is enough to know that a test fails; shrinking takes longer than finding.
settings.register_profile("mutants", parent=settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


PROCESSES = Path(__file__).parent / "process"


def pytest_report_header() -> str:
    """How many examples each property gets, unless it says otherwise itself."""
    return f"hypothesis: profile {settings.get_current_profile_name()}, {settings().max_examples} examples a property"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The mark `process` for a whole room and for what uses the fixture `pools`; others are marked where they stand.

    In the profile `check`, of a test's parameters only the first and the last: few examples, as of what is drawn.
    """
    for item in items:
        if PROCESSES in item.path.parents or "pools" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
    if settings.get_current_profile_name() == "check":
        of_test: dict[str, list[pytest.Item]] = {}
        for item in items:
            of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = {item for same in of_test.values() for item in (same[0], same[-1])}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def pytest_runtest_teardown() -> None:
    """Forget compiled programs in time: each maps memory, and at the 65,531st mapping of a process XLA dies."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cpu N`, because wall time says little on a machine that is shared."""
    parser.addoption(
        "--cpu", type=int, metavar="N", help="list the N tests that took most CPU, child processes included"
    )


def cpu_seconds() -> float:
    """CPU time of this process, and of those it started that have ended: a pool's counts where it is closed."""
    return sum(os.times()[:4])


STAMP = [0.0]


def pytest_collection_finish() -> None:
    """From here on time belongs to tests."""
    STAMP[0] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Write down what a test's set-up, call or tear-down took."""
    report = yield
    now = cpu_seconds()
    report.user_properties = [("cpu", now - STAMP[0])]
    STAMP[0] = now
    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The list of `--cpu`."""
    if config.option.cpu is None:
        return
    total: dict[str, float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, seconds in getattr(report, "user_properties", []):
            if name == "cpu":
                total[report.nodeid] = total.get(report.nodeid, 0.0) + seconds
    terminalreporter.section(f"CPU seconds: {sum(total.values()):.0f} in all")
    for test in sorted(total, key=lambda test: -total[test])[: config.option.cpu]:
        terminalreporter.write_line(f"{total[test]:8.1f}  {test}")


@pytest.fixture(scope="module", autouse=True)
def as_users_compile(request: pytest.FixtureRequest):
    """The mark `optimized` of a file."""
    if request.node.get_closest_marker("optimized"):
        with quick_compile.optimized():
            yield
    else:
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_ranks():
    """Ranks are forked from one process that has PyTorch: to import it takes longer than most cases.

    The tests of the command start processes of their own, in which ranks are spawned as users have them.
    """
    real = multiprocessing.get_context
    server = real("forkserver")
    server.set_forkserver_preload(["npu_backend.workers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: server if method == "spawn" else real(method))
        yield
    forkserver._forkserver._stop()  # waits for it, so that its CPU counts


@pytest.fixture(scope="module")
def pools():
    """A persistent pool of processes of the NPU backend for each cp; they start when they are first used."""
    from npu_backend.workers import Workers

    found = {cp: Workers(cp, timeout=60) for cp in (1, 2, 3, 4)}
    yield found
    for workers in found.values():
        workers.close()
