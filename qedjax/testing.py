"""Tiny models and tokenizers for tests of this project and of its forks."""

import dataclasses
import os
import pathlib

import numpy as np

from qedjax.model.config import ModelConfig
from qedjax.types import TrainBatch

# (family, tied, head_dim apart from D / N): one config of each kind that conversion and parity must handle.
_TINY = ModelConfig(vocab_size=320, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, rope_theta=1e6,
                    max_positions=4096, dtype='float32', attention_block=16, remat='none')


def tiny_config(family: str = 'qwen3', **changes) -> ModelConfig:
    """A model of about 40k parameters; head_dim is not D / N, and V exceeds the tokenizer's ids. `changes` replace fields."""
    kinds = {'qwen3': {}, 'qwen2': {'qk_norm': False, 'qkv_bias': True}, 'llama': {'qk_norm': False, 'tie_embeddings': False}}
    return dataclasses.replace(_TINY, family=family, **(kinds[family] | changes))


def random_batch(seed: int, rows: int, length: int, vocab: int = 300) -> TrainBatch:
    """Packed rows of random ids: documents of random lengths, a padding tail, about half of the targets trained. Host arrays."""
    rng = np.random.default_rng(seed)
    tokens, weights = rng.integers(0, vocab, (rows, length)), rng.random((rows, length)) < 0.5
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < length - length // 8:
            size = int(rng.integers(1, length // 2 + 1))
            segments[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(min(size, length - start))
            start, segment = start + size, segment + 1
    following = np.roll(segments, -1, axis=1)
    following[:, -1] = 0
    targets = np.where(following == segments, np.roll(tokens, -1, axis=1), 0)
    weights = weights & (segments > 0) & (following == segments)
    return TrainBatch(tokens.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32), positions, segments)


def shared_data() -> pathlib.Path:
    """Folder of real problems, proofs and tokenizers (QEDJAX_SHARED, or ../shared beside the repository); skips the test if absent."""
    import pytest

    folder = pathlib.Path(os.environ.get('QEDJAX_SHARED', pathlib.Path(__file__).parents[2] / 'shared')) / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}')
    return folder
