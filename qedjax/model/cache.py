"""A dense key/value cache: one slot a position, carried through the scanned layers and updated in place."""

import dataclasses

import jax
import jax.numpy as jnp

from qedjax.model.config import ModelConfig
from qedjax.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each [L, B, S, K, H]; slot s of a row holds position s of that row."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def create(cls, cfg: ModelConfig, batch: int, slots: int) -> 'KVCache':
        """An empty cache in the compute dtype, sharded over rows and kv heads."""
        shape = (cfg.num_layers, batch, slots, cfg.num_kv_heads, cfg.head_dim)
        sharding = spec(None, 'batch', None, 'kv_heads', None)
        return cls(*(jnp.zeros(shape, cfg.dtype, out_sharding=sharding) for _ in range(2)))

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> 'KVCache':
        """Stores k, v [B, T, K, H] at positions [B, T] of one layer; positions outside the cache are dropped."""
        rows = jnp.arange(k.shape[0])[:, None]

        def store(cache, new):
            return cache.at[layer, rows, positions].set(new, mode='drop', out_sharding=jax.typeof(cache).sharding)

        return KVCache(store(self.k, k), store(self.v, v))
