"""What a run keeps on each device, from its config alone: parameters, optimizer, gradients, saved activations, cache.

State is measured exactly, on shapes that are never made; what the compiler needs besides is an estimate, for where it cannot be asked.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from qedjax.model import attention_splash
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.sharding import TRAIN_AXES
from qedjax.train.optimizer import OptimizerConfig, make_optimizer
from qedjax.train.step import init_state

REPLICATED = 64 * 10**6  # bytes above which an array should be split


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A training mesh of no devices."""
    return AbstractMesh(tuple(sizes.values()), TRAIN_AXES, axis_types=(AxisType.Explicit,) * len(TRAIN_AXES))


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, sizes: dict[str, int]):
    """The train state as shapes with shardings, on a mesh of no devices."""
    return _state(dataclasses.replace(model, remat='full'), optimizer, tuple(sizes.items()))  # no remat policy changes the state


@functools.lru_cache(maxsize=256)
def _state(model: ModelConfig, optimizer: OptimizerConfig, sizes: tuple[tuple[str, int], ...]):
    with jax.sharding.use_abstract_mesh(abstract_mesh(dict(sizes))):
        return jax.eval_shape(lambda: init_state(Transformer(model, jax.random.key(0)), make_optimizer(optimizer, 1)))


def bytes_a_device(tree: Any) -> int:
    """Bytes of a device's part of all arrays."""
    return sum(_local(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def replicated(tree: Any) -> list[tuple[str, int]]:
    """Arrays above REPLICATED bytes of which every device has a whole copy, though there are several devices."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size > REPLICATED and _local(leaf) == math.prod(leaf.shape) and leaf.sharding.mesh.size > 1:
            found.append((jax.tree_util.keystr(path), size))
    return found


def _local(leaf: jax.ShapeDtypeStruct) -> int:
    sharding: Any = leaf.sharding
    axes = jax.tree.leaves(tuple(sharding.spec)) if sharding is not None else []
    return math.prod(leaf.shape) // math.prod(sharding.mesh.shape[axis] for axis in axes)


def gradient_bytes(model: ModelConfig, sizes: dict[str, int]) -> int:
    """Sums of float32 gradients on a device."""
    return 4 * model.num_params // (sizes['fsdp'] * sizes['tensor'])


def activation_bytes(model: ModelConfig, sizes: dict[str, int], rows: int, length: int) -> int:
    """Estimate of what a micro-batch of `rows` rows needs on a device beside state and gradients.

    That is: weights cast to the compute dtype, what the remat policy keeps of every layer, the backward pass of one layer (its weights
    whole, about three copies of its largest activations, and splash's partial dQ), and the logits of one block of the vocabulary.
    """
    item, tensor = jnp.dtype(model.dtype).itemsize, sizes['tensor']
    devices = math.prod(sizes.values())
    positions = rows * length * tensor // devices
    heads, kv, mlp = (n // tensor for n in (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.mlp_dim))
    layer = (model.num_params - model.vocab_size * model.embed_dim * (1 if model.tie_embeddings else 2)) // model.num_layers
    kept = {'full': 0, 'attention': heads, 'dots': 2 * heads + 2 * kv + 2 * mlp + model.embed_dim,
            'none': 4 * heads + 4 * kv + 4 * mlp + 4 * model.embed_dim}[model.remat]
    saved = model.num_layers * positions * (model.embed_dim + kept) * item
    working = 3 * positions * (model.embed_dim + heads + 2 * kv + 2 * mlp) * item + 3 * layer // tensor * item
    logits = 2 * 4 * max(2**24, 1024 * positions)
    cast = item * model.num_params // (sizes['fsdp'] * tensor)
    partial = 0
    if model.attention == 'splash':  # of each block of keys
        partial = rows * length**2 // attention_splash.block_size(length) * model.num_heads * model.head_dim * item // devices
    return cast + saved + working + partial + logits


def kv_bytes(model: ModelConfig, tensor: int) -> int:
    """Bytes that one cached position takes on each of the devices that share its heads."""
    return model.num_layers * 2 * math.ceil(model.num_kv_heads / tensor) * model.head_dim * jnp.dtype(model.dtype).itemsize


def table_bytes(rows: int, pages: int) -> int:
    """Scalar memory that ragged attention takes to decode `rows` rows of up to `pages` pages on a shard.

    That is the page table with one page more, in tiles of 8 x 128 ids; two lists of a number a row; and some 4 KB. It was found by trying:
    libtpu takes 504 rows of 390 pages, 288 of 780, 1008 of 195 and 16 of 16,255, and neither 508, 292, 1016 nor 8 of 32,639.
    """
    def up(n: int, tile: int) -> int:
        return -(-n // tile) * tile

    return 4 * (up(rows, 8) * up(pages + 1, 128) + 2 * up(rows + 1, 128)) + 4096
