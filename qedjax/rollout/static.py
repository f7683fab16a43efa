"""A plain sampler for batches of prompts: one jitted prefill and one jitted decode loop; rows own their pages. No scheduling.

It runs under any mesh, the training mesh of many processes in lock-step included, which the engine does not; and it is what the engine
is tested against. For speed use the engine.

Prompts are sorted by length and run in batches of a fixed number of rows; lengths are padded up to a few buckets, so the number of
compiled shapes does not grow with traffic.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qedjax.model.cache import PagedCache, row_table
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rollout.requests import Limits, check_request
from qedjax.rollout.sampling import Choice, sample, token_keys
from qedjax.sharding import axis_size, spec
from qedjax.types import SamplingParams

BUCKET = 64  # prompt lengths are padded to BUCKET times a power of two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch of requests on device, one a row: sampling parameters, stop ids [B, n] (padded with -2) and sample indices."""

    temperature: jax.Array
    max_tokens: jax.Array
    seeds: jax.Array
    samples: jax.Array
    stop_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """Carry of the decode loop: tokens drawn so far [B, S], their log-probs, rows still going, the last hidden states and the cache."""

    count: jax.Array
    ids: jax.Array
    logprobs: jax.Array
    active: jax.Array
    hidden: jax.Array
    cache: PagedCache


def generate(model: Transformer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, num_valid: int, batch: int = 16,
             samples: Sequence[int] | None = None, progress: Callable[[int], object] = lambda done: None):
    """Samples one completion a prompt; call it under `jax.set_mesh`.

    Args:
      prompts: token ids of each prompt.
      params: sampling parameters of each prompt.
      num_valid: ids that the tokenizer can decode.
      batch: rows decoded together, rounded up to a multiple of the mesh's data shards.
      samples: sample index of each prompt (default 0): samples of one prompt with one seed differ by it.
      progress: called with the number of finished prompts.

    Returns: (ids, logprobs, finish_reason) a prompt, in order. Raises ValueError as `check`, and under a mesh with a context axis.
    """
    if axis_size('sequence') != 1:
        raise ValueError('decoding has one position at a time, which a context axis cannot split; use sharding.without_context(mesh)')
    check(model.cfg, prompts, params, num_valid, batch)
    batch = -(-batch // axis_size('batch')) * axis_size('batch')
    samples = [0] * len(prompts) if samples is None else samples
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), params[i].max_tokens or 0))
    results: list = [None] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for row, result in zip(rows, _run_batch(model, rows, prompts, params, samples, num_valid, batch), strict=True):
            results[row] = result
        progress(min(start + batch, len(order)))
    return results


def check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], num_valid: int, batch: int = 1) -> None:
    """Raises ValueError, in one sentence, for requests that a model of this config cannot serve; needs no weights and no mesh."""
    if batch < 1:
        raise ValueError(f'batch must be at least 1, not {batch}')
    if not 0 < num_valid <= cfg.vocab_size:
        raise ValueError(f'the tokenizer has {num_valid} ids, but the model has only {cfg.vocab_size} rows')
    limits = Limits(cfg.max_positions, num_valid, max_stop_ids=num_valid, max_bias=0, cached=cfg.max_positions)
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        check_request(prompt, p, limits, f'prompt {i}')
        if p != SamplingParams(p.temperature, p.max_tokens, p.seed, p.stop_ids) or p.max_tokens is None:
            raise ValueError(f'prompt {i} asks for more than temperature, max_tokens, seed and stop_ids, which takes the engine: {p}')


def _bucket(length: int) -> int:
    return BUCKET * 2 ** max(0, int(np.ceil(np.log2(length / BUCKET))))


def _run_batch(model, rows, prompts, params, samples, num_valid, batch):
    """One batch; rows that are missing are copies of the first that stop after one token."""
    fill = [rows[0]] * (batch - len(rows))
    every = [*rows, *fill]
    width = _bucket(max(len(prompts[i]) for i in rows))
    budget = _bucket(max(params[i].max_tokens or 0 for i in rows))
    tokens, lengths = np.zeros((batch, width), np.int32), np.array([len(prompts[i]) for i in every], np.int32)
    stops = np.full((batch, max(1, *(len(params[i].stop_ids) for i in rows))), -2, np.int32)
    for row, i in enumerate(every):
        tokens[row, : lengths[row]] = prompts[i]
        stops[row, : len(params[i].stop_ids)] = params[i].stop_ids
    requests = Requests(
        np.array([params[i].temperature for i in every], np.float32),
        np.array([params[i].max_tokens for i in rows] + [1] * len(fill), np.int32),
        np.array([params[i].seed for i in every], np.uint32), np.array([samples[i] for i in every], np.int32), stops)
    count, ids, logprobs = jax.device_get(_complete(model, tokens, lengths, requests, budget=budget, num_valid=num_valid))
    return [_cut(ids[row, : count[row]], logprobs[row, : count[row]], params[i]) for row, i in enumerate(rows)]


def _cut(ids, logprobs, params):
    """Host view of one row: (ids, log-probs, finish reason)."""
    if ids[-1] < 0:
        return tuple(ids[:-1].tolist()), tuple(logprobs[:-1].tolist()), 'error'
    return tuple(ids.tolist()), tuple(logprobs.tolist()), 'stop' if ids[-1] in params.stop_ids else 'length'


def _prefill(model: Transformer, tokens: jax.Array, lengths: jax.Array, table: jax.Array, budget: int) -> Loop:
    """Runs right-padded prompts [B, T]; slots past a prompt's end hold garbage that decoding overwrites before it looks."""
    B, T = tokens.shape
    positions = jax.reshard(jnp.broadcast_to(jnp.arange(T), (B, T)), spec('batch', 'sequence'))
    cache = PagedCache.create(model.cfg, B // axis_size('batch') * table.shape[1], BUCKET)
    hidden, cache = model.decode(tokens, positions, cache, table)
    hidden = jax.reshard(hidden, spec('batch', None, None))
    last = jnp.sum(jnp.where((jnp.arange(T) == lengths[:, None] - 1)[..., None], hidden, 0), axis=1)
    ids = jnp.full((B, budget), -1, jnp.int32, out_sharding=spec('batch', None))
    return Loop(jnp.zeros(B, jnp.int32, out_sharding=spec('batch')), ids, ids.astype(jnp.float32),
                jnp.ones(B, bool, out_sharding=spec('batch')), last, cache)


@functools.partial(jax.jit, static_argnames=('budget', 'num_valid'))
def _complete(model: Transformer, tokens: jax.Array, lengths: jax.Array, requests: Requests, budget: int, num_valid: int):
    """Draws tokens until every row has stopped or spent its budget: (count [B], ids [B, budget], log-probs [B, budget])."""
    lengths, requests = jax.tree.map(lambda x: jax.reshard(x, spec('batch')), (lengths, requests))
    table = row_table(len(tokens), (tokens.shape[1] + budget) // BUCKET)
    loop = _prefill(model, jax.reshard(tokens, spec('batch', 'sequence')), lengths, table, budget)
    slots = jnp.arange(budget)

    def draw(loop: Loop) -> tuple[Loop, jax.Array]:
        logits = jax.reshard(model.logits(loop.hidden[:, None])[:, 0], spec('batch', None))
        draw = sample(logits, token_keys(requests.seeds, requests.samples, loop.count), Choice(requests.temperature), num_valid)
        ids, logprobs = draw.ids, draw.logprobs
        here = (slots == loop.count[:, None]) & loop.active[:, None]
        stopped = (ids[:, None] == requests.stop_ids).any(-1) | (ids < 0)
        count = loop.count + loop.active
        loop = dataclasses.replace(loop, count=count, ids=jnp.where(here, ids[:, None], loop.ids),
                                   logprobs=jnp.where(here, logprobs[:, None], loop.logprobs),
                                   active=loop.active & ~stopped & (count < requests.max_tokens))
        return loop, jnp.maximum(ids, 0)

    def body(loop: Loop) -> Loop:
        loop, ids = draw(loop)
        positions = (lengths + loop.count - 1)[:, None]
        hidden, cache = model.decode(jax.reshard(ids[:, None], spec('batch', None)), positions, loop.cache, table)
        return dataclasses.replace(loop, hidden=hidden[:, 0], cache=cache)

    loop = jax.lax.while_loop(lambda loop: loop.active.any(), body, loop)
    # Whole on every device: each process can then read it, whichever rows its own devices hold.
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), (loop.count, loop.ids, loop.logprobs))
