"""What a torch_npu wheel declares, read from its files: another torch would cost gigabytes."""

import re
import zipfile
from pathlib import Path

SCHEMA = re.compile(rb"\b(_?npu_\w+(?:\.\w+)?)\((?:Tensor|Tensor\[\]) [^\0]*\) -> [^\0]+")
HEADER = "AtbOpsInterface.h"
TYPES = {"const at::Tensor&": "Tensor", "const c10::optional<at::Tensor>&": "Tensor?", "bool": "bool"}


def signatures(wheel: Path) -> dict[str, str]:
    """Schemas by operator name, as the string literals of the wheel's libraries have them.

    Compilers keep some literals in pieces; for operators of the atb header that are nowhere else, arguments are read
    from there: types and names, without defaults.
    """
    found: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if re.search(r"/lib/lib(torch_npu|op_plugin_atb)\.so$", name):
                for match in SCHEMA.finditer(files.read(name)):
                    found[match[1].decode()] = normal(match[0].decode())
        headers = [files.read(name).decode() for name in files.namelist() if name.endswith(HEADER)]
    for header in headers:
        for match in re.finditer(r"tuple<at::Tensor, at::Tensor> (npu_paged_cache_load)\((.*?)\);", header):
            found.setdefault(match[1], f"{match[1]}({_from_header(match[2])}) -> (Tensor, Tensor)")
    return found


def _from_header(arguments: str) -> str:
    """C++ arguments as a schema without defaults writes them."""
    for cpp, schema in TYPES.items():
        arguments = re.sub(rf"(^|, ){re.escape(cpp)} ?(\w)", rf"\1{schema} \2", arguments)
    return arguments


def normal(schema: str) -> str:
    """A schema with numbers as PyTorch prints them: 1 and 1.0 of a float are 1."""
    schema = schema.partition("::")[2] if "::" in schema else schema
    return re.sub(r"(float \w+=)(\d+)(\.0*)?(?=[,)])", r"\1\2.", schema)


def arguments(schema: str) -> dict[str, str]:
    """Argument names and their types, in order."""
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    parts = (part.partition("=")[0].rpartition(" ") for part in re.split(r", (?![^\[]*\])", inside) if part != "*")
    return {name: kind for kind, _, name in parts}


def differences(ours: str, theirs: str) -> list[str]:
    """How the arguments of their schema differ from ours, one line each."""
    mine, other = arguments(ours), arguments(theirs)
    lines = [f"without {name}" for name in mine if name not in other]
    lines += [f"with {name}" for name in other if name not in mine]
    both = [name for name in mine if name in other]
    lines += [f"{name} is {other[name]}, not {mine[name]}" for name in both if other[name] != mine[name]]
    if [name for name in other if name in mine] != both:
        lines.append("in another order")
    return lines
