"""Every number of the verdicts on drawn results, to see that a change of the judge's code changes none of them.

    python tools/verdicts.py --count 5000 before.jsonl        # in the old checkout
    python tools/verdicts.py --count 5000 after.jsonl         # in the new one
    diff before.jsonl after.jsonl

Three in five results are correct (both sets of `cpjax.trial`), two in five are faulty; with and without lse, in every
profile, some judged in another precision than theirs. Floats are written in hexadecimal: a difference in the last bit
is a difference. Of every tenth result that fails, the diagnosis is written too.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from cpjax.crosscheck import Verdict, judge
from cpjax.crosscheck.run.workers import each
from cpjax.trial.detection import CAUSAL, LOGITS, MEANS, Setting, bench
from cpjax.trial.emulators import PROFILES
from cpjax.trial.false_alarms import given
from cpjax.trial.faults import FAULTS, SIZED

KEYS = (24, 64, 256, 1024)


def line(seed: int, number: int) -> str:
    """One result and what the judge says of it, as JSON."""
    asked, arrays = (_correct if number % 5 < 3 else _faulty)(seed, number)
    query, key, value, out, lse = arrays
    if number % 11 == 0 and out.dtype != np.float64:  # judged as what it is not
        asked["precision"], out = "flash_bf16", out.astype(bfloat16).astype(np.float32)
    verdict = judge(query, key, value, out, lse if number // 5 % 2 else None, **asked)
    sha = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in (query, key, value, out, lse)))
    said = _numbers(verdict) | {"number": number, "arrays": sha.hexdigest()[:16], "precision": asked["precision"]}
    if not verdict.passed and verdict.judgeable and number // 5 % 5 == 0 and key.shape[1] <= 1024:
        weights = verdict.chunk_weights
        said |= {"diagnosis": verdict.diagnosis, "weights": None if weights is None else weights.ravel().tolist()}
    return json.dumps(_exact(said), sort_keys=True)


def _correct(seed: int, number: int) -> tuple[dict[str, Any], tuple]:
    one = given("tuning" if number % 2 else "held-out", seed, number)
    problem = one.problem
    asked = {**problem.judge_arguments(), "precision": one.profile, "order": one.order}
    return asked, (problem.query, problem.key, problem.value, *one.result)


def _faulty(seed: int, number: int) -> tuple[dict[str, Any], tuple]:
    rng = np.random.default_rng([5, seed, number])
    setting = Setting(
        str(rng.choice(list(PROFILES))), int(rng.choice(KEYS)), str(rng.choice(list(LOGITS))), float(rng.choice(MEANS))
    )
    names = [*FAULTS, *SIZED]
    name = names[number % len(names)]
    made = bench(setting, seed + number, is_causal=name in CAUSAL or bool(rng.integers(2)))
    fault = FAULTS[name] if name in FAULTS else partial(SIZED[name][0], size=float(rng.choice(SIZED[name][1])))
    asked = {**made.problem.judge_arguments(), "precision": setting.profile, "order": made.order}
    return asked, (made.problem.query, made.problem.key, made.problem.value, *fault(made))


def _numbers(verdict: Verdict) -> dict[str, Any]:
    return {name: x for name, x in asdict(replace(verdict, search=None)).items() if name != "search"}


def _exact(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: _exact(x) for key, x in value.items()}
    return [_exact(x) for x in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Write one line a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    lines = sorted(
        each(partial(line, options.seed), range(options.count), options.workers, chunk=8),
        key=lambda text: json.loads(text)["number"],
    )
    options.file.write_text("\n".join([*lines, ""]))
    failed = sum(not json.loads(text)["passed"] for text in lines)
    print(f"{len(lines)} verdicts, {failed} of them not passed, in {options.file}")


if __name__ == "__main__":
    main()
