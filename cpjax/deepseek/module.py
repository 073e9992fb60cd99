"""The weights as Flax NNX modules that bear the checkpoint's names: a parameter's path is its name in the file.

Needs `pip install cpjax[flax]`. The functions of this package take `ModelWeights`; a module only holds them.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpjax.deepseek.checkpoint import Checkpoint, check_computed, open_checkpoint
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import ModelWeights, forward
from cpjax.deepseek.names import shapes, weights_of
from cpjax.errors import InputError


class Node(nnx.Module):
    """A module that has only parts; which ones, the names of the tensors say."""

    def __init__(self, parts: dict[str, Any]):
        """Take a tree of arrays, in which a level with names 0, 1, … is a list."""
        for name, part in parts.items():
            setattr(self, name, _made(part))


class DeepseekV3ForCausalLM(Node):
    """A model on one device.

    Args:
      config: its shape.
      tensors: every tensor of `cpjax.deepseek.names.shapes`, by name.

    >>> from cpjax.deepseek.config import SMALL
    >>> model = nnx.eval_shape(lambda: DeepseekV3ForCausalLM(SMALL, {n: jnp.ones(s) for n, s in shapes(SMALL).items()}))
    >>> sorted(names_of(model)) == sorted(shapes(SMALL))
    True
    """

    def __init__(self, config: DeepseekConfig, tensors: dict[str, Any]):
        """Hang each tensor where its name says."""
        tree: dict[str, Any] = {}
        for name in shapes(config):
            *path, last = name.split(".")
            level = tree
            for part in path:
                level = level.setdefault(part, {})
            level[last] = tensors[name]
        super().__init__(tree)
        self.config = config

    def weights(self) -> ModelWeights:
        """The arrays, as the functions of this package take them."""
        state = {name: x[...] for name, x in nnx.to_flat_state(nnx.state(self))}
        tensors = {".".join(map(str, path)): x for path, x in state.items()}
        return weights_of(self.config, tensors.__getitem__, jnp.stack)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Logits of a whole text."""
        return forward(self.weights(), self.config, ids)


def names_of(model: nnx.Module) -> list[str]:
    """The paths of a module's parameters, joined by dots."""
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]


def read_module(folder: Path, dtype: str) -> DeepseekV3ForCausalLM:
    """The module of a checkpoint, computed in float64 or float32.

    Raises:
      InputError: what `open_checkpoint` refuses, a quantised checkpoint, or a dtype in which nothing is computed.
    """
    check_computed(dtype)
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantized:
        raise InputError(f"{folder} is quantised; a module holds floats only, use cpjax.deepseek.checkpoint.load")
    return DeepseekV3ForCausalLM(checkpoint.config, _tensors(checkpoint, dtype))


def _tensors(checkpoint: Checkpoint, dtype: str) -> dict[str, Array]:
    return {
        name: jnp.asarray(checkpoint.read(name, tuple(slice(0, n) for n in shape)).astype(dtype))
        for name, shape in shapes(checkpoint.config).items()
    }


def _made(part: Any) -> Any:
    if not isinstance(part, dict):
        return nnx.Param(part)
    if set(part) == {str(number) for number in range(len(part))}:
        return nnx.List([_made(part[str(number)]) for number in range(len(part))])
    return Node(part)
