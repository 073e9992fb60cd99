"""python -m npu_backend.sdk: see the package."""

import argparse
import sys
from pathlib import Path

from npu_backend.errors import InputError
from npu_backend.schemas import SCHEMAS
from npu_backend.sdk.signatures import differences, signatures
from npu_backend.sdk.wheel import VERSION, environment, install

EXAMPLE = """examples:
  python -m npu_backend.sdk install build/torch_npu
  python -m npu_backend.sdk signatures torch_npu-2.8.0-cp311-cp311-manylinux_2_28_x86_64.whl"""


def main() -> int:
    """The command; 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m npu_backend.sdk",
        description="The real torch_npu on a host without CANN.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("install", help=f"torch_npu {VERSION} and stand-ins for CANN, in a folder of their own")
    one.add_argument("folder", type=Path)
    two = commands.add_parser("signatures", help="how the operators of a wheel differ from those of schemas.py")
    two.add_argument("wheel", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        if args.command == "install":
            _install(args.folder)
        else:
            for wheel in args.wheel:
                _signatures(wheel)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _install(folder: Path) -> None:
    install(folder)
    print(f"torch_npu {VERSION} is in {folder / 'site'}. To import it:")
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        print(f"export {name}={environment(folder)[name]}")


def _signatures(wheel: Path) -> None:
    if not wheel.is_file():
        raise InputError(f"{wheel} is not a file")
    found = signatures(wheel)
    print(wheel.name)
    for schema in SCHEMAS:
        name = schema.partition("::")[2].partition("(")[0]
        lines = differences(schema, found[name]) if name in found else ["not found"]
        print(f"  {name}: {'; '.join(lines) or 'the same arguments'}")


if __name__ == "__main__":
    sys.exit(main())
