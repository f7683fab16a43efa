"""A paged key/value cache: one array for all layers, carried through the scanned layers and updated in place."""

import dataclasses

import jax
import jax.numpy as jnp

from qedjax.model import attention_paged, attention_ragged
from qedjax.model.config import ModelConfig
from qedjax.sharding import axis_size, spec

BACKENDS = {'xla': attention_paged, 'ragged': attention_ragged}  # each with its own layout of a page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer in pages of C positions, any page for any row; who owns which is told by page tables.

    Attributes:
      pages: [L, P, *page], a page laid out as the backend likes it. P is split over the batch axes: page numbers count from 0 on each
        of their shards, and a row's pages lie on the row's own shard. The last page of a shard is nobody's: what must not be
        written anywhere is written there.
      backend: 'xla' or 'ragged'.
    """

    pages: jax.Array
    backend: str = dataclasses.field(metadata={'static': True})

    @classmethod
    def create(cls, cfg: ModelConfig, num_pages: int, page_size: int) -> 'PagedCache':
        """An empty cache in the compute dtype, of `num_pages` pages, and nobody's, on each shard of the batch."""
        page = BACKENDS[cfg.paged_attention].page_shape(page_size, cfg.num_kv_heads, cfg.head_dim)
        shape = (cfg.num_layers, (num_pages + 1) * axis_size('batch'), *page)
        return cls(jnp.zeros(shape, cfg.dtype, out_sharding=page_spec(cfg.paged_attention)), cfg.paged_attention)

    @property
    def page_size(self) -> int:
        """Positions C of a page."""
        return BACKENDS[self.backend].page_size(self.pages)


def page_spec(backend: str) -> jax.sharding.PartitionSpec:
    """Sharding of a cache's pages."""
    return spec(None, 'batch', *BACKENDS[backend].PAGE_AXES)


def row_table(batch: int, pages_a_row: int) -> jax.Array:
    """Page table [B, n] of a batch whose rows own n pages each, in order: a cache without an allocator."""
    local = batch // axis_size('batch')
    table = (jnp.arange(batch) % local)[:, None] * pages_a_row + jnp.arange(pages_a_row)
    return jax.reshard(table.astype(jnp.int32), spec('batch', None))
