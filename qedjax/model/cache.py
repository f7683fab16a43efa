"""A paged key/value cache: one array for all layers, carried through the scanned layers and updated in place."""

import dataclasses

import jax
import jax.numpy as jnp

from qedjax.model.config import ModelConfig
from qedjax.sharding import axis_size, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer in pages of C positions, any page for any row; who owns which is told by page tables.

    Attributes:
      pages: [L, P, C, 2K, H], key and value of a head side by side. P is split over the batch axes: page numbers count from 0 on
        each of their shards, and a row's pages lie on the row's own shard.
    """

    pages: jax.Array

    @classmethod
    def create(cls, cfg: ModelConfig, num_pages: int, page_size: int) -> 'PagedCache':
        """An empty cache in the compute dtype, of `num_pages` pages on each shard of the batch."""
        shape = (cfg.num_layers, num_pages * axis_size('batch'), page_size, 2 * cfg.num_kv_heads, cfg.head_dim)
        return cls(jnp.zeros(shape, cfg.dtype, out_sharding=cls.sharding()))

    @staticmethod
    def sharding() -> jax.sharding.PartitionSpec:
        return spec(None, 'batch', None, 'kv_heads', None)


def row_table(batch: int, pages_a_row: int) -> jax.Array:
    """Page table [B, n] of a batch whose rows own n pages each, in order: a cache without an allocator."""
    local = batch // axis_size('batch')
    table = (jnp.arange(batch) % local)[:, None] * pages_a_row + jnp.arange(pages_a_row)
    return jax.reshard(table.astype(jnp.int32), spec('batch', None))
