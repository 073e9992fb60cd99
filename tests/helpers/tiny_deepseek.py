"""What the tests of a DeepSeek model on a mesh share: a small config, texts, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest

from cpjax.deepseek.checkpoint import Checkpoint, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL, DeepseekConfig

TINY = replace(SMALL, vocab_size=97, hidden_size=48, num_hidden_layers=2, n_routed_experts=8)
IDS = np.random.default_rng(0).integers(0, 97, (2, 21))
"""Two texts of `TINY`."""


def random_checkpoint(folders: pytest.TempPathFactory, config: DeepseekConfig, seed: int) -> Checkpoint:
    """Written into a new folder, and opened."""
    folder = folders.mktemp("checkpoint") / "model"
    write_random(folder, config, seed=seed)
    return open_checkpoint(folder)
