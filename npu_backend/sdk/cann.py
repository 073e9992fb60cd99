"""Stand-ins for CANN: shared libraries with the symbols that torch_npu's libraries want and nothing provides."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from npu_backend.errors import InputError


class Library(NamedTuple):
    """What the dynamic linker reads of one ELF file."""

    needed: list[str]  # libraries, by soname
    wanted: set[str]  # undefined symbols that no version ties to a system library, weak ones left out
    defined: set[str]


def read_library(path: Path) -> Library:
    """The linker's view of an ELF shared library.

    Raises:
      InputError: pyelftools is not installed.
    """
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise InputError("reading libraries needs pyelftools: pip install pyelftools") from error
    with path.open("rb") as file:
        elf: Any = ELFFile(file)
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        versions = elf.get_section_by_name(".gnu.version")
        wanted, defined = set(), set()
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if symbol["st_shndx"] != "SHN_UNDEF":
                defined.add(symbol.name)
            elif symbol.name and symbol["st_info"]["bind"] != "STB_WEAK":
                # glibc and libstdc++ version their symbols, CANN and torch do not.
                version = "VER_NDX_GLOBAL" if versions is None else versions.get_symbol(i)["ndx"]
                if version in ("VER_NDX_GLOBAL", "VER_NDX_LOCAL"):
                    wanted.add(symbol.name)
        return Library(needed, wanted, defined)


def missing(torch_npu: Path) -> tuple[set[str], set[str]]:
    """Symbols and libraries that the torch_npu package in this folder needs and neither it, torch nor Python has."""
    own = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C.*.so")]
    spec = importlib.util.find_spec("torch")
    if not own or spec is None or spec.origin is None:
        raise InputError(f"{torch_npu} has no libraries of torch_npu, or torch is not installed")
    torch = [*(Path(spec.origin).parent / "lib").glob("*.so*")]
    wheel = [read_library(path) for path in own]
    defined = set().union(*(library.defined for library in (*wheel, *map(read_library, torch))))
    symbols = {
        name
        for library in wheel
        for name in library.wanted
        if name not in defined and not hasattr(ctypes.pythonapi, name)
    }
    known = {path.name for path in (*own, *torch)}
    # System libraries carry a version in their name (libstdc++.so.6).
    libraries = {
        name for library in wheel for name in library.needed if name not in known and not re.search(r"\.so\.\d", name)
    }
    return symbols, libraries


def build_stand_ins(torch_npu: Path, folder: Path) -> None:
    """Compile the missing libraries into a folder. The first has all the symbols: the linker asks all of them.

    Raises:
      InputError: there is no C compiler, or it fails.
    """
    compiler = find_compiler()
    symbols, libraries = missing(torch_npu)
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(sorted(libraries)):
        source = "".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols)) if i == 0 else ""
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        run = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if run.returncode:
            raise InputError(f"{compiler} cannot build a stand-in for {name}: {run.stderr.strip()}")


def find_compiler() -> str:
    """A C compiler.

    Raises:
      InputError: there is none.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise InputError("no C compiler (cc, gcc, clang) on PATH; the stand-ins for CANN have to be compiled")
    return compiler
