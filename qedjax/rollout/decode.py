"""The engine's device code: prefill, and a decode loop that refills its own rows. Every shape is fixed by the configuration.

Requests in progress are the *members* of a pool of M on each shard of the batch; the first B of them that can run, in order of arrival,
are decoded. A member that ends leaves its row to the next one inside the loop, so rows do not idle until the host looks.

Letters besides the model's: R shards of the batch, M members a shard, n pages a member, S steps a call.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qedjax.model.cache import PagedCache, page_spec
from qedjax.model.transformer import Transformer
from qedjax.rollout.sampling import Choice, sample, token_keys
from qedjax.sharding import spec

LAST = jnp.iinfo(jnp.int32).max  # sorts after every arrival


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Members, one an entry of [R, M].

    Attributes:
      active: whether it has still to draw.
      token, position: the last id of prompt and completion so far, which is fed next, and where.
      drawn: ids drawn so far.
      limit: ids that it may draw in all.
      capacity: positions that its pages hold; beyond it a member waits for the host.
      arrival: members run in this order.
      table: [R, M, n] pages.
      seed, sample: of its random stream.
      min_tokens, stop_ids: [R, M] and [R, M, k]; no stop id is drawn before so many ids. -1 pads.
      temperature, top_k, top_p, min_p, bias_ids, bias: of the choice (see SamplingParams). -1 pads bias_ids.
    """

    active: jax.Array
    token: jax.Array
    position: jax.Array
    drawn: jax.Array
    limit: jax.Array
    capacity: jax.Array
    arrival: jax.Array
    table: jax.Array
    seed: jax.Array
    sample: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    bias_ids: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a call of decode drew: count [R, M]; then [R, M, S] (top_*: [R, M, S, k]); steps and rows that ran are [R].

    An id of -1 tells that the logits were not finite.
    """

    count: jax.Array
    ids: jax.Array
    logprobs: jax.Array
    entropies: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None
    steps: jax.Array
    rows: jax.Array


@functools.partial(jax.jit, donate_argnames=('cache',))
def prefill(model: Transformer, cache: PagedCache, tokens: jax.Array, positions: jax.Array, table: jax.Array) -> PagedCache:
    """Writes tokens [B, T] at positions [B, T] (-1 pads a row's end) to the pages of table [B, n]; B is split over the shards."""
    tokens, positions, table = (jax.reshard(x, spec('batch', None)) for x in (tokens, positions, table))
    return model.decode(tokens, positions, cache, table)[1]


@functools.partial(jax.jit, donate_argnames=('cache',))
def edit_pages(cache: PagedCache, source: jax.Array, target: jax.Array, count: jax.Array) -> PagedCache:
    """Copies page source[r, i] of shard r to page target[r, i], in order, for i < count[r]; a source of -1 writes zeros."""

    def local(pages, source, target, count):
        def edit(i, pages):
            page = jax.lax.dynamic_slice_in_dim(pages, jnp.maximum(source[0, i], 0), 1, axis=1)
            page = jnp.where(source[0, i] >= 0, page, jnp.zeros_like(page))
            return jax.lax.dynamic_update_slice_in_dim(pages, page, target[0, i], axis=1)

        return jax.lax.fori_loop(0, count[0], edit, pages)

    rows, counts = spec('batch', None), spec('batch')
    source, target, count = jax.reshard(source, rows), jax.reshard(target, rows), jax.reshard(count, counts)
    pages = page_spec(cache.backend)
    edited = jax.shard_map(local, in_specs=(pages, rows, rows, counts), out_specs=pages, check_vma=False)(
        cache.pages, source, target, count)
    return dataclasses.replace(cache, pages=edited)


@functools.partial(jax.jit, static_argnames=('slots', 'steps', 'num_valid', 'top', 'entropy'), donate_argnames=('cache', 'pool'))
def decode(model: Transformer, cache: PagedCache, pool: Pool, told: Pool, fresh: jax.Array, *, slots: int, steps: int, num_valid: int,
           top: int, entropy: bool) -> tuple[PagedCache, Pool, Drawn]:
    """Takes in the host's changes and draws for up to `steps` steps, or until no member can run.

    Args:
      pool: the members as the device knows them.
      told: the members as the host does: pages, capacity and a False in `active` always count, the rest where `fresh` [R, M].
      slots: rows B decoded together on each shard.
      num_valid, top, entropy: see sampling.sample.
    """
    told, fresh = jax.tree.map(lambda x: jax.reshard(x, spec('batch', *[None] * (x.ndim - 1))), (told, fresh))
    pool = _take_in(pool, told, fresh)
    # Rows know nothing of each other, and so nothing of shards.
    draw_rows = jax.shard_map(functools.partial(sample, num_valid=num_valid, top=top, entropy=entropy), in_specs=(spec('batch'),) * 3,
                              out_specs=spec('batch'), check_vma=False)
    drawn = _nothing_drawn(fresh.shape, steps, top, entropy)

    def body(carry):
        cache, pool, drawn = carry
        rows = _select(pool, slots)
        live = rows.active
        hidden, cache = model.decode(rows.token[:, None], jnp.where(live, rows.position, -1)[:, None], cache, rows.table)
        logits = jax.reshard(model.logits(hidden)[:, 0], spec('batch', None))
        banned = jnp.where((rows.drawn < rows.min_tokens)[:, None], rows.stop_ids, -1)
        # An idle row must not ask for anything: what no live row needs is not computed.
        choice = Choice(jnp.where(live, rows.temperature, 0), jnp.where(live, rows.top_k, 0), jnp.where(live, rows.top_p, 1),
                        jnp.where(live, rows.min_p, 0), jnp.where(live[:, None], banned, -1),
                        jnp.where(live[:, None], rows.bias_ids, -1), rows.bias)
        draw = draw_rows(logits, token_keys(rows.seed, rows.sample, rows.drawn), choice)
        pool, drawn = _commit(pool, drawn, rows, draw)
        return cache, pool, drawn

    def unfinished(carry):
        _, pool, drawn = carry
        return (jnp.max(drawn.steps) < steps) & jnp.any(_runnable(pool))

    return jax.lax.while_loop(unfinished, body, (cache, pool, drawn))


def _runnable(pool: Pool) -> jax.Array:
    return pool.active & (pool.position < pool.capacity)


def _take_in(pool: Pool, told: Pool, fresh: jax.Array) -> Pool:
    def merge(old, new):
        return jnp.where(jnp.expand_dims(fresh, range(2, old.ndim)), new, old)  # a reshape to [1, M, 1] would lose its sharding

    merged = jax.tree.map(merge, pool, told)
    return dataclasses.replace(merged, table=told.table, capacity=told.capacity, active=merged.active & told.active)


def _nothing_drawn(shape: tuple[int, ...], steps: int, top: int, entropy: bool) -> Drawn:
    def zeros(*more, dtype=jnp.int32):
        sizes = (*shape, *more)
        return jnp.zeros(sizes, dtype, out_sharding=spec('batch', *[None] * (len(sizes) - 1)))

    shards = jnp.zeros(shape[0], jnp.int32, out_sharding=spec('batch'))
    return Drawn(zeros(), zeros(steps), zeros(steps, dtype=jnp.float32), zeros(steps, dtype=jnp.float32) if entropy else None,
                 zeros(steps, top) if top else None, zeros(steps, top, dtype=jnp.float32) if top else None, shards, shards)


def _select(pool: Pool, slots: int) -> Pool:
    """The members that run now, one a row: a Pool of [R * B] whose `arrival` is the member's index instead, -1 where a row is idle."""

    def local(pool: Pool) -> Pool:
        runnable = _runnable(pool)[0]
        chosen = jnp.argsort(jnp.where(runnable, pool.arrival[0], LAST))[:slots].astype(jnp.int32)
        rows = jax.tree.map(lambda x: x[0, chosen], pool)
        return dataclasses.replace(rows, active=runnable[chosen], arrival=jnp.where(runnable[chosen], chosen, -1))

    return jax.shard_map(local, in_specs=(spec('batch'),), out_specs=spec('batch'), check_vma=False)(pool)


def _commit(pool: Pool, drawn: Drawn, rows: Pool, draw) -> tuple[Pool, Drawn]:
    """Writes what the rows drew to their members, and to the output. By selection, not scatter: CPUs would run a loop for each."""

    def local(pool: Pool, drawn: Drawn, rows: Pool, draw) -> tuple[Pool, Drawn]:
        members, steps = drawn.ids.shape[1:]
        runs = (jnp.arange(members)[:, None] == rows.arrival) & rows.active  # [M, B]
        row, ran = jnp.argmax(runs, axis=1), runs.any(axis=1)
        here = (jnp.arange(steps) == drawn.count[0, :, None]) & ran[:, None]  # [M, S]

        def put(array, values):
            return jnp.where(ran, values[row], array[0])[None]

        def append(array, values):
            if array is None:
                return None
            values = values[row][:, None]
            return jnp.where(here.reshape(here.shape + (1,) * (values.ndim - 2)), values, array[0])[None]

        ended = (draw.ids < 0) | (draw.ids[:, None] == rows.stop_ids).any(1) | (rows.drawn + 1 >= rows.limit)
        pool = dataclasses.replace(pool, active=put(pool.active, ~ended), token=put(pool.token, jnp.maximum(draw.ids, 0)),
                                   position=put(pool.position, rows.position + 1), drawn=put(pool.drawn, rows.drawn + 1))
        return pool, Drawn(drawn.count + ran, append(drawn.ids, draw.ids), append(drawn.logprobs, draw.logprobs),
                           append(drawn.entropies, draw.entropies), append(drawn.top_ids, draw.top_ids),
                           append(drawn.top_logprobs, draw.top_logprobs), drawn.steps + 1, drawn.rows + jnp.sum(rows.active))

    return jax.shard_map(local, in_specs=(spec('batch'),) * 4, out_specs=spec('batch'), check_vma=False)(pool, drawn, rows, draw)
