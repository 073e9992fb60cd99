"""`python -m npu_backend run CASES RESULTS`, alone or under torchrun, and `python -m npu_backend layer …`."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from npu_backend.decode import ENGINES, LSES, MERGES, Decoding
from npu_backend.errors import InputError, RankError
from npu_backend.families import FAMILIES
from npu_backend.layer.run import LayerOutcome, run_layers
from npu_backend.rank import Settings
from npu_backend.runner import Outcome, is_first_rank, run
from npu_backend.schedule import EXCHANGES, Exchange

EXAMPLES = """examples:
  python -m npu_backend run cases results                  one process per cp rank, on this host's CPU
  python -m npu_backend run cases results --device npu     one process per NPU
  python -m npu_backend run cases results --exchange gather --profile
  torchrun --nproc-per-node 2 -m npu_backend run cases results --device npu

exit status: 0 all computed (or finished before), 1 a run failed, 2 bad input."""


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "npu_backend", description="Context-parallel attention on Atlas NPUs, or on a CPU."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_layer(commands)
    command = commands.add_parser(
        "run",
        help="compute cases",
        description="Compute cases by ring attention; one result file per case (docs/formats.md).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("cases", type=Path, metavar="CASES", help="a folder of case files, or one case file")
    command.add_argument("results", type=Path, metavar="RESULTS", help="folder for the results; made if it is missing")
    command.add_argument("--device", choices=("cpu", "npu"), default="cpu", help="where tensors live (default: cpu)")
    command.add_argument(
        "--operators",
        choices=tuple(FAMILIES),
        default="ring_mla",
        help="the family of operators: ring_mla (MindIE), fia (vLLM-Ascend), fusion (MindSpeed); default: ring_mla",
    )
    command.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default="ring",
        help="how keys and values travel: ring, gather (MindIE's order), double-ring; default: ring",
    )
    command.add_argument(
        "--inner", type=int, metavar="N", help="ranks of a node in a double ring; under torchrun: those of this host"
    )
    command.add_argument(
        "--lse", choices=LSES, default="float32", help="decode: how lse travels; MindIE: float16; default: float32"
    )
    command.add_argument(
        "--merge",
        choices=MERGES,
        default="attention-update",
        help="decode: without-maximum is MindIE's, it overflows at lse 88.7; default: attention-update",
    )
    command.add_argument(
        "--engine", choices=ENGINES, default="mindie", help="decode: whose cache and exchange; default: mindie"
    )
    command.add_argument(
        "--interleave",
        type=int,
        default=1,
        metavar="N",
        help="decode, vllm-ascend: tokens that follow each other on one rank; default: 1",
    )
    command.add_argument(
        "--profile", action="store_true", help="write seconds of computing and waiting per step into the results"
    )
    command.add_argument(
        "--json", action="store_true", help="print name, cp, seconds, seconds_per_step, result as JSON"
    )
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="seconds without any sign of life after which the run has failed (default: 600)",
    )
    return parser.parse_args(argv)


def _add_layer(commands: Any) -> None:
    command = commands.add_parser(
        "layer",
        help="compute whole decoder layers",
        description="Compute decoder layers of DeepSeek-V3 stage by stage, on one device (docs/formats.md).",
        epilog="exit status: 0 all computed (or finished before), 1 a layer failed, 2 bad input.",
    )
    command.add_argument("cases", type=Path, metavar="CASES", help="a folder of layer cases, or one case file")
    command.add_argument("results", type=Path, metavar="RESULTS", help="folder for the results; made if it is missing")
    command.add_argument("--device", choices=("cpu", "npu"), default="cpu", help="where tensors live (default: cpu)")
    command.add_argument("--json", action="store_true", help="print name, is_moe, seconds, result as JSON")


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = _arguments(argv)
    return _layer(arguments) if arguments.command == "layer" else _run(arguments)


def _layer(arguments: argparse.Namespace) -> int:
    try:
        outcomes = run_layers(arguments.cases, arguments.results, device=arguments.device)
    except InputError as error:
        return _complain(str(error), 2, first_only=True)
    except KeyboardInterrupt:
        return _complain("interrupted; finished cases are kept and will not be computed again", 130, first_only=True)
    if arguments.json:
        print(json.dumps([_public(outcome) for outcome in outcomes], indent=2))
    for outcome in outcomes:
        if outcome.error is not None:
            _complain(f"{outcome.name}: {outcome.error}", 1, first_only=True)
        elif not arguments.json:
            kind = "experts" if outcome.is_moe else "dense"
            print(f"{outcome.name}: {kind}, {outcome.seconds:.3f} s, {outcome.result}")
    return int(any(outcome.error is not None for outcome in outcomes))


def _run(arguments: argparse.Namespace) -> int:
    try:
        decoding = Decoding(arguments.lse, arguments.merge, arguments.engine, arguments.interleave)
        settings = Settings(_exchange(arguments), arguments.operators, arguments.profile, decoding)
        outcomes = run(
            arguments.cases, arguments.results, device=arguments.device, timeout=arguments.timeout, settings=settings
        )
    except InputError as error:
        return _complain(str(error), 2, first_only=True)
    except RankError as error:
        return _complain(str(error), 1, first_only=False)
    except KeyboardInterrupt:
        return _complain("interrupted; finished cases are kept and will not be computed again", 130, first_only=True)
    if arguments.json and is_first_rank():
        print(json.dumps([_public(outcome) for outcome in outcomes], indent=2))
    for outcome in outcomes:
        if outcome.error is not None:
            _complain(f"{outcome.name}: {outcome.error}", 1, first_only=True)
        elif not arguments.json:
            print(f"{outcome.name}: cp {outcome.cp}, {outcome.seconds:.3f} s, {outcome.result}")
    return int(any(outcome.error is not None for outcome in outcomes))


def _exchange(arguments: argparse.Namespace) -> Exchange:
    if arguments.exchange != "double-ring":
        if arguments.inner is not None:
            raise InputError(f"--inner is for --exchange double-ring; exchange {arguments.exchange} has no nodes")
        return Exchange(arguments.exchange)
    inner = arguments.inner or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if inner < 1:
        raise InputError("--exchange double-ring needs --inner N, the ranks of a node (a divisor of cp)")
    return Exchange("double-ring", inner)


def _public(outcome: Outcome | LayerOutcome) -> dict:
    """The JSON object of an outcome; `error` only where there is one."""
    return {key: value for key, value in outcome._asdict().items() if key != "error" or value is not None}


def _complain(message: str, status: int, *, first_only: bool) -> int:
    if is_first_rank() or not first_only:
        print(f"npu_backend: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
