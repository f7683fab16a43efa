"""Tiny models that transformers and this project must agree on: configurations, documents, and weights from a seed.

Shared by test_parity.py (live), tools/make_goldens.py (writes tests/goldens) and test_goldens.py (no torch).
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from qedjax.model.config import ModelConfig, RopeScaling
from qedjax.model.transformer import Transformer
from qedjax.sharding import abstract
from qedjax.testing import tiny_config
from qedjax.types import TrainBatch

_DENSE = {'attention_block': 64}  # rows of one block compile faster; the first case takes the chunked path
# Wide heads, so that frequencies reach from one radian a position down to none.
_LONG = {'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 64, 'max_positions': 8192, **_DENSE}
_YARN = RopeScaling('yarn', factor=4.0, original_positions=2048)
_LLAMA3 = RopeScaling('llama3', factor=8.0, original_positions=1024, low_freq_factor=1.0, high_freq_factor=4.0)

SHORT = {
    'qwen3': tiny_config('qwen3'),
    'qwen3_untied': tiny_config('qwen3', tie_embeddings=False, norm_eps=1e-5, **_DENSE),
    'qwen2': tiny_config('qwen2', **_DENSE),
    'qwen2_untied': tiny_config('qwen2', tie_embeddings=False, num_kv_heads=2, **_DENSE),
    'llama': tiny_config('llama', norm_eps=1e-5, rope_theta=1e4, **_DENSE),
    'llama_bias': tiny_config('llama', qkv_bias=True, output_bias=True, tie_embeddings=True, num_kv_heads=1, **_DENSE),
}
LONG = {
    'theta_5e6': tiny_config('qwen3', rope_theta=5e6, **_LONG),
    'linear': tiny_config('llama', rope_theta=1e4, rope_scaling=RopeScaling('linear', factor=4.0), **_LONG),
    'yarn': tiny_config('qwen3', rope_theta=1e6, rope_scaling=_YARN, **_LONG),
    'yarn_options': tiny_config('qwen2', rope_scaling=dataclasses.replace(
        _YARN, beta_fast=24.0, beta_slow=2.0, attention_factor=1.3, truncate=False), **_LONG),
    'llama3': tiny_config('llama', rope_theta=5e5, rope_scaling=_LLAMA3, **_LONG),
}
CASES = SHORT | LONG


def random_state(*seed) -> np.random.RandomState:
    """The legacy generator, whose streams numpy promises never to change: golden files outlive numpy versions."""
    return np.random.RandomState(zlib.crc32(repr(seed).encode()))


def name_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')


def named(model: Transformer) -> dict[str, np.ndarray]:
    """Leaves of a model, or of its gradient, by name."""
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def seeded_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model with numpy weights on the mesh in force: no scale is one, no bias zero, attention far from uniform."""
    def fill(path, leaf):
        name = name_of(path)
        x = random_state(seed, name).standard_normal(leaf.shape)
        x = 1 + 0.3 * x if name.endswith('norm') else 0.03 * x if name == 'embed' else 0.3 * x
        x = x.astype(leaf.dtype)
        return jax.make_array_from_callback(x.shape, leaf.sharding, lambda index: x[index])

    model = abstract(lambda: Transformer(cfg, jax.random.key(0)), jax.sharding.get_mesh())
    return jax.tree_util.tree_map_with_path(fill, model)


@dataclasses.dataclass(frozen=True)
class Document:
    """Ids, positions (with gaps where a few ids stand for a long text) and loss weights of one document, each [T]."""

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def document(cfg: ModelConfig, length: int, *seed, span: int | None = None) -> Document:
    """A random document; with `span`, its positions are a sample of range(span) that contains both ends."""
    rng = random_state(length, span, *seed)
    positions = np.arange(length)
    if span:
        positions = np.sort(np.concatenate([[0, span - 1], 1 + rng.choice(span - 2, length - 2, replace=False)]))
    weights = (rng.random_sample(length) < 0.7).astype(np.float32)
    return Document(rng.randint(cfg.vocab_size, size=length), positions, weights * (np.arange(length) < length - 1))


def whole(ids: list[int]) -> Document:
    """These ids from position 0, every prediction with weight 1."""
    count = len(ids)
    return Document(np.array(ids), np.arange(count), (np.arange(count) < count - 1).astype(np.float32))


def documents_of(case: str) -> list[list[Document]]:
    """Rows of documents of one case: two packed ones and a padded one, or one that reaches position 8,191."""
    cfg = CASES[case]
    if case in LONG:
        return [[document(cfg, 64, case, span=8192)]]
    return [[document(cfg, 23, case), document(cfg, 17, case)], [document(cfg, 31, case)]]


def pack(rows: list[list[Document]], length: int) -> TrainBatch:
    """The rows as a batch [len(rows), length], padded at the end."""
    fields = np.zeros((5, len(rows), length))
    for row, documents in enumerate(rows):
        start = 0
        for number, doc in enumerate(documents, start=1):
            end = start + len(doc.tokens)
            targets = np.append(doc.tokens[1:], 0)
            for field, values in zip(fields, (doc.tokens, targets, doc.weights, doc.positions, number), strict=True):
                field[row, start:end] = values
            start = end
    return TrainBatch(*(jnp.asarray(x, jnp.float32 if i == 2 else jnp.int32) for i, x in enumerate(fields)))


def unpack(values: np.ndarray, rows: list[list[Document]]) -> list[np.ndarray]:
    """[B, T, ...] -> one [length, ...] a document, in order."""
    out = []
    for row, documents in zip(values, rows, strict=True):
        ends = np.cumsum([len(doc.tokens) for doc in documents])
        out += np.split(row, ends)[:-1]
    return out


def loss_and_logits(model: Transformer, batch: TrainBatch):
    """Sum of weighted cross entropies, and logits [B, T, V]: plain, for tests."""
    logits = model.logits(model(batch.tokens, batch.positions, batch.segment_ids))
    hit = jnp.arange(logits.shape[-1]) == batch.targets[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)
    return jnp.sum(losses * batch.weights), logits


evaluate = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))


def digest(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each gradient its norm and its products with four random directions, float64 [5]."""
    def one(name, gradient):
        directions = random_state('digest', name).standard_normal((4, *gradient.shape))
        gradient = gradient.astype(np.float64)
        return np.append(np.linalg.norm(gradient), (directions * gradient).reshape(4, -1).sum(-1))

    return {name: one(name, gradient) for name, gradient in gradients.items()}


def error(actual: np.ndarray, expected: np.ndarray, keep: int = 0) -> float:
    """Largest difference over largest expected value; with `keep`, the worst such ratio over the leading axes."""
    axes = tuple(range(keep, np.ndim(expected)))
    difference = np.abs(np.asarray(actual, np.float64) - expected).max(axes)
    return float((difference / np.abs(expected).max(axes)).max())


def sampled(length: int) -> np.ndarray:
    """Positions of a document whose logits a golden file keeps: the first, the last and three between."""
    return np.linspace(0, length - 1, 5).astype(int)
