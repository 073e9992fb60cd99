"""Which tensor of a file of several is which, by the names that people give them."""

from pathlib import Path

from cpjax.crosscheck.dumps.readers import names_in, only_file
from cpjax.errors import InputError

KNOWN = {
    "query": ("query", "q", "query_states", "q_states", "query_layer", "xq"),
    "key": ("key", "k", "key_states", "k_states", "key_layer", "xk"),
    "value": ("value", "v", "value_states", "v_states", "value_layer", "xv"),
    "out": ("out", "o", "output", "attn_out", "attn_output", "attention_out", "context_layer", "core_attn_out"),
    "lse": ("lse", "softmax_lse", "logsumexp"),
    "sink": ("sink", "sinks"),
}
"""What each may be called, in any case, as a whole or behind the last dot: in vLLM, PyTorch, Hugging Face (…_states),
Megatron and TransformerEngine (…_layer), Llama (xq), the vendor's operators."""


def named(path: Path, said: str | None, given: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Option → FILE::NAME of every tensor that is found.

    Args:
      path: the file, or a folder: of the one file, of a file for each tensor, or of ranks.
      said: "query=attn.q,key=attn.k": names that differ.
      given: options that name their own files; they are not looked for here.

    Raises:
      InputError: a name that is not there, two that may be the same, none for query, key, value or out.
    """
    path = only_file(path)
    there = names_in(path)
    found: dict[str, Path] = {}
    for pair in [] if said is None else said.split(","):
        option, equals, name = pair.partition("=")
        if not equals or option not in KNOWN:
            raise InputError(f"--names {pair[:60]!r} is no OPTION=NAME; options are {', '.join(KNOWN)}")
        if name not in there:
            raise InputError(f"--names {pair[:60]!r}: {path} holds {', '.join(there[:12])}")
        found[option] = Path(f"{path}::{name}")
    taken = {str(one).partition("::")[2] for one in found.values()}
    for option, words in KNOWN.items():
        if option in found or option in given:
            continue
        fits = [name for name in there if name not in taken and name.rpartition(".")[2].lower() in words]
        if len(fits) > 1:
            raise InputError(f"{path}: {' and '.join(fits)} may both be {option}; say --names {option}=NAME")
        if fits:
            found[option] = Path(f"{path}::{fits[0]}")
    missing = [option for option in ("query", "key", "value", "out") if option not in found and option not in given]
    if missing:
        holds = f"it holds {', '.join(there[:12])}" if there else "it is no dict of tensors"
        raise InputError(
            f"{path}: no tensor is named as {', '.join(missing)} may be; {holds}: say --names "
            f"{','.join(f'{option}=NAME' for option in missing)}"
        )
    return found
