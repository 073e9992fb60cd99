"""A plugin of pytest: which tests run which line, and how long each takes.

`LINES_OF_TESTS=FILE pytest -p lines_of_tests FOLDER` writes FILE as JSON: `lines`, {path below cpjax/: {line: [number
of a test]}}; `tests`, the names of the tests; `seconds` of each. Lines that run when a module is imported belong to no
test. Between two tests every `functools.cache` of this project is emptied, so that each test runs what it needs itself.
"""

import json
import os
import sys
import time
from pathlib import Path

import coverage
import pytest

PACKAGE = Path.cwd() / "cpjax"
RECORD = coverage.Coverage(data_file=None, config_file=False, source=[str(PACKAGE)])
SECONDS: dict[str, float] = {}

RECORD.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Write down what this test runs, beginning with empty caches."""
    _empty_caches()
    RECORD.switch_context(item.nodeid)
    start = time.process_time()
    done = yield
    SECONDS[item.nodeid] = time.process_time() - start
    RECORD.switch_context("")
    return done


def pytest_sessionfinish() -> None:
    """Write the file."""
    RECORD.stop()
    data = RECORD.get_data()
    tests = list(SECONDS)
    number = {test: k for k, test in enumerate(tests)}
    lines = {}
    for file in sorted(data.measured_files()):
        runs = {line: [number[name] for name in names if name] for line, names in data.contexts_by_lineno(file).items()}
        lines[Path(file).relative_to(PACKAGE).as_posix()] = {line: found for line, found in runs.items() if found}
    record = {"tests": tests, "seconds": list(SECONDS.values()), "lines": lines}
    Path(os.environ["LINES_OF_TESTS"]).write_text(json.dumps(record))


def _empty_caches() -> None:
    """Of this project's modules and of its tests': what one test has computed, another must not take for granted."""
    here = str(Path.cwd())
    for module in list(sys.modules.values()):
        if not (getattr(module, "__file__", None) or "").startswith(here):
            continue
        for thing in list(vars(module).values()):
            if callable(getattr(thing, "cache_clear", None)) and callable(getattr(thing, "cache_info", None)):
                thing.cache_clear()
