"""The rollout engine: continuous batching over the devices of one process.

    step:  admit -> prefill -> grow -> dispatch chunk n+1 -> read chunk n -> end, requeue
                                             |                   ^
    device:            ... chunk n ----------+-- chunk n+1 ------+----

The host reads a chunk while the next one runs, so it decides one chunk late; that is safe because the device keeps its own account of
who has ended, and because pages given to someone else are written only by programs that were dispatched later.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qedjax.metrics import compilations
from qedjax.model.cache import PagedCache
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rollout import decode
from qedjax.rollout.engine_config import (
    EngineConfig,
    Stats,
    limits_of,
    pages_a_shard,
    prefill_shape,
    prefill_shapes,
    table_width,
    validate,
)
from qedjax.rollout.requests import Request, check_request
from qedjax.rollout.scheduler import Member, Prefix, Scheduler
from qedjax.rollout.text import TextStream
from qedjax.sharding import abstract, axis_size, create, localise, spec
from qedjax.types import Completion, SamplingParams

EDITS = 8  # pages edited a call
PREFILL_CALLS = 8  # most prefill calls between two decode calls


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A decode call under way: its output, whom each entry of the pool belonged to, and the version of the weights."""

    drawn: decode.Drawn
    members: list[list[Member | None]]
    version: int


class Engine:
    """Serves requests from one model; a single thread may call it. Everything is compiled when it is made.

    Args:
      model: parameters in any layout on the devices of `mesh`; they are copied into the rollout layout, or taken over if `donate`.
      mesh: rollout mesh (sharding.make_rollout_mesh) over devices of this process.
      config: sizes.
      num_valid: ids that the tokenizer can decode.
      tokenizer: for text and stop strings; without it completions have ids alone.
      cfg: of the rollout copy, where its dtypes or kernels differ from those of `model`.

    Raises ValueError for sizes that do not fit the model or the mesh.
    """

    def __init__(self, model: Transformer, mesh: Mesh, config: EngineConfig, num_valid: int, tokenizer: Any = None, *,
                 cfg: ModelConfig | None = None, donate: bool = False):
        cfg = cfg or model.cfg
        self.mesh, self.config, self.num_valid, self.tokenizer = mesh, config, num_valid, tokenizer
        with jax.set_mesh(mesh):
            self._shards = axis_size('batch')
        validate(config, self._shards, cfg)
        self.limits = limits_of(config, cfg, num_valid, self._shards)
        self._slots, members = config.slots // self._shards, (config.slots + config.staged) // self._shards
        self._width, pages = table_width(config, cfg), pages_a_shard(config, cfg, self._shards)
        self._scheduler = Scheduler(self._shards, members, pages, config.page_size, config.steps)
        self._target = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
        self.stats = Stats()
        self._arrivals, self._requests, self._ended = 0, set[Request](), list[Request]()
        self._texts: collections.deque[tuple[Callable[[str], Any], str]] = collections.deque()
        self._told = blank_pool((self._shards, members), self._width, config)
        self._fresh = np.zeros((self._shards, members), bool)
        self._cache = create(lambda: PagedCache.create(cfg, pages, config.page_size), mesh)
        self._pool, self._there = self._put(self._told), jax.tree.leaves(self._put((self._told, self._fresh)))
        self._sent = [array.copy() for array in jax.tree.leaves((self._told, self._fresh))]
        self._inflight: _Chunk | None = None
        self.version = 0
        self.set_weights(model, 0, donate=donate)
        self._warm_up()

    # What callers use.

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_text: Callable[[str], Any] | None = None) -> Request:
        """Queues a request. Raises ValueError for one that cannot be served; `on_text` gets newly released text at the end of a step."""
        check_request(prompt, params, self.limits)
        if (params.stop or on_text) and self.tokenizer is None:
            raise ValueError('stop strings and streams of text need a tokenizer: give one to the engine')
        limit = min(self.limits.max_length, self.limits.cached) - len(prompt) if params.max_tokens is None else params.max_tokens
        stream = TextStream(self.tokenizer, params.stop) if params.stop or on_text else None
        expires = np.inf if params.deadline is None else time.monotonic() + params.deadline
        hear = on_text and (lambda text: self._texts.append((on_text, text)))
        request = Request(np.asarray(prompt, np.int32), params, limit, self._arrivals, expires, hear, stream)
        self._arrivals += 1
        self._requests.add(request)
        self._scheduler.enqueue(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request with what it has; nothing happens if it has ended."""
        if request.completion is None:
            self._end(request, 'cancelled')

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def idle(self) -> bool:
        """Whether step has nothing to do and nothing to tell."""
        return not self._requests and not self._ended

    @property
    def queued(self) -> int:
        """Requests that have no entry in the pool yet."""
        return len(self._requests) - len(self._scheduler.member_of)

    def set_weights(self, model: Transformer, version: int, *, refresh: bool = False, donate: bool = False) -> None:
        """New weights from the next chunk on.

        Requests that have drawn ids keep their cache, which older weights wrote, unless `refresh`; all others start under the new
        weights. `model` may live in another layout on the same devices; it is copied (and cast), never through the host, or taken over
        if `donate`: the caller must not use it again. If it lies on several processes, all of them must call this.
        """
        shapes, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (model, self._target))
        if shapes != wanted:
            raise ValueError(f'the new weights are of another model: arrays of {shapes}, but the engine has {wanted}')
        self._read()
        self._model = None  # gone before the new weights come
        leaves = [localise(leaf.astype(target.dtype), target.sharding, donate)
                  for leaf, target in zip(jax.tree.leaves(model), jax.tree.leaves(self._target), strict=True)]
        self._model = jax.tree.unflatten(jax.tree.structure(self._target), leaves)
        self._scheduler.renew(everyone=refresh)
        self.version = version

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams],
                 progress: Callable[[int], object] = lambda done: None) -> list[Completion]:
        """Serves all of these and returns their completions in order."""
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            check_request(prompt, p, self.limits, f'prompt {i}')
        requests = [self.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        waiting = set(requests)
        while waiting:
            if ended := waiting.intersection(self.step()):
                waiting -= ended
                progress(len(requests) - len(waiting))
        return [request.completion for request in requests if request.completion]

    def step(self) -> list[Request]:
        """One round of work, as drawn above; returns the requests that ended in it."""
        start, waited = time.perf_counter(), self.stats.waited
        self._expire()
        with jax.set_mesh(self.mesh):
            self._scheduler.admit(self._slots)
            self._zero_dirty()
            self._prefill()
            self._attach()
            preempted = self._scheduler.grow()
            self._zero_dirty()  # pages that growing has freed and handed on
            chunk = self._dispatch()
            self._read()
            self._inflight = chunk
        for request in preempted:
            if request.completion is None:
                self._scheduler.enqueue(request)
        self.stats.preemptions += len(preempted)
        self.stats.compilations = compilations() - self._compiled
        self.stats.worked += time.perf_counter() - start - (self.stats.waited - waited)
        while self._texts:  # last: callers may cancel, submit or raise
            on_text, text = self._texts.popleft()
            on_text(text)
        ended, self._ended = self._ended, []
        return ended

    # The parts of a step.

    def _expire(self) -> None:
        now = time.monotonic()
        for request in [request for request in self._requests if request.expires <= now]:
            self._end(request, 'deadline')

    def _end(self, request: Request, reason: str) -> None:
        if member := self._scheduler.member_of.get(request):
            if reason == 'error':
                self._scheduler.taint(member)
            self._scheduler.remove(member)
        self._requests.remove(request)
        request.finish(reason, self.tokenizer)
        self._ended.append(request)

    def _zero_dirty(self) -> None:
        self._edit([(shard, -1, page) for shard, page in self._scheduler.dirty])
        self._scheduler.dirty.clear()

    def _edit(self, edits: Sequence[tuple[int, int, int]]) -> None:
        """Page edits (shard, source, target); see decode.edit_pages."""
        while edits:
            source, target = (np.zeros((self._shards, EDITS), np.int32) for _ in range(2))
            count, left = np.zeros(self._shards, np.int32), []
            for edit in edits:
                shard, at = edit[0], count[edit[0]]
                if at == EDITS:
                    left.append(edit)
                    continue
                source[shard, at], target[shard, at] = edit[1:]
                count[shard] += 1
            self._cache, edits = decode.edit_pages(self._cache, source, target, count), left

    def _prefill(self) -> None:
        """Prefills waiting prompts: all of them while rows are idle, one call's worth when every row has work."""
        for _ in range(1 if len(self._scheduler.running()) >= self.config.slots else PREFILL_CALLS):
            if filling := self._scheduler.filling():
                self._prefill_call(filling)

    def _prefill_call(self, filling: Sequence[Prefix]) -> None:
        rows, length = prefill_shape(self.config, [len(p.tokens) - p.filled for p in filling], self._shards)
        tokens = np.zeros((self._shards, rows, length), np.int32)
        positions, table = np.full_like(tokens, -1), np.zeros((self._shards, rows, self._width), np.int32)
        taken = [0] * self._shards
        for prefix in filling:
            if (row := taken[prefix.shard]) < rows:
                taken[prefix.shard] += 1
                part = prefix.tokens[prefix.filled : prefix.filled + length]
                tokens[prefix.shard, row, : len(part)] = part
                positions[prefix.shard, row, : len(part)] = prefix.filled + np.arange(len(part))
                table[prefix.shard, row, : len(prefix.pages)] = prefix.pages
                prefix.filled += len(part)
                self.stats.prefill_tokens += len(part)
        self.stats.prefill_positions += tokens.size
        self._cache = decode.prefill(self._model, self._cache, *(x.reshape(-1, x.shape[2]) for x in (tokens, positions, table)))

    def _attach(self) -> None:
        attached = self._scheduler.attach()
        self._edit([(a.member.shard, *a.copy) for a in attached if a.copy])
        for a in attached:
            self._tell(a.member)

    def _tell(self, member: Member) -> None:
        """Writes a new member into the host's pool."""
        request, where, told = member.request, (member.shard, member.index), self._told
        params, drawn = request.params, len(request.ids)
        self._fresh[where] = True
        values = {
            'token': request.ids[-1] if drawn else request.prompt[-1], 'position': request.length - 1, 'drawn': drawn,
            'limit': request.limit, 'arrival': request.arrival, 'seed': params.seed, 'sample': params.sample,
            'min_tokens': min(params.min_tokens, request.limit), 'temperature': params.temperature, 'top_k': params.top_k,
            'top_p': params.top_p, 'min_p': params.min_p}
        for name, value in values.items():
            getattr(told, name)[where] = value
        for array, row in ((told.stop_ids, params.stop_ids), (told.bias_ids, [i for i, _ in params.logit_bias]),
                           (told.bias, [b for _, b in params.logit_bias])):
            array[where] = -1
            array[where][: len(row)] = row

    def _dispatch(self) -> _Chunk | None:
        """Starts a decode call for all members; None if there are none."""
        members, told = [list(row) for row in self._scheduler.members], self._told
        told.active[...] = False
        for member in (running := self._scheduler.running()):
            where = member.shard, member.index
            told.active[where], told.capacity[where] = True, len(member.pages) * self.config.page_size
            told.table[where][: len(member.pages)] = member.pages
        if not running:
            return None
        there, start = self._put_told(), time.perf_counter()
        self._cache, self._pool, drawn = decode.decode(self._model, self._cache, self._pool, *there, **self._decode_sizes)
        self.stats.waited += time.perf_counter() - start  # on GPUs a loop whose end is data runs while it is called
        self._fresh[...] = False
        self.stats.chunks += 1
        return _Chunk(drawn, members, self.version)

    def _read(self) -> None:
        """Hands the ids of the chunk under way to their requests."""
        chunk, self._inflight = self._inflight, None
        if chunk is None:
            return
        start = time.perf_counter()
        drawn = jax.device_get(chunk.drawn)
        self.stats.waited += time.perf_counter() - start
        self.stats.tokens += int(drawn.count.sum())
        self.stats.row_steps += int(drawn.rows.sum())
        self.stats.slot_steps += int(drawn.steps.sum()) * self._slots
        for shard, index in zip(*np.nonzero(drawn.count), strict=True):
            member = chunk.members[shard][index]
            if member is not None and member.request.completion is None:
                count = drawn.count[shard, index]
                reason = member.request.extend(chunk.version, *_rows(drawn, shard, index, count))
                if reason:
                    self._end(member.request, reason)

    # Set-up.

    @property
    def _decode_sizes(self) -> dict[str, Any]:
        config = self.config
        return {'slots': self._slots, 'steps': config.steps, 'num_valid': self.num_valid, 'top': config.top_logprobs,
                'entropy': config.entropy}

    def _put(self, tree):
        """Host arrays on the devices, the first dimension over the shards. Copies: the host goes on writing to its own."""
        with jax.set_mesh(self.mesh):
            shardings = jax.tree.map(lambda x: NamedSharding(self.mesh, spec('batch', *[None] * (x.ndim - 1))), tree)
        return jax.device_put(jax.tree.map(np.copy, tree), shardings)

    def _put_told(self) -> tuple[decode.Pool, jax.Array]:
        """The host's pool and `fresh` on the devices; only what has changed since the last time is sent."""
        now, structure = jax.tree.flatten((self._told, self._fresh))
        changed = [i for i, (array, sent) in enumerate(zip(now, self._sent, strict=True)) if not np.array_equal(array, sent)]
        for i, there in zip(changed, self._put([now[i] for i in changed]), strict=True):
            self._sent[i], self._there[i] = now[i].copy(), there
        return jax.tree.unflatten(structure, self._there)

    def _warm_up(self) -> None:
        """Compiles every program that traffic can need, by running it on nothing."""
        with jax.set_mesh(self.mesh):
            for rows, length in prefill_shapes(self.config):
                nothing = np.full((self._shards * rows, length), -1, np.int32)
                table = np.zeros((self._shards * rows, self._width), np.int32)
                self._cache = decode.prefill(self._model, self._cache, np.zeros_like(nothing), nothing, table)
            none = np.zeros((self._shards, EDITS), np.int32)
            self._cache = decode.edit_pages(self._cache, none, none, none[:, 0])
            self._cache, self._pool, drawn = decode.decode(
                self._model, self._cache, self._pool, *self._put_told(), **self._decode_sizes)
        jax.device_get(drawn.count)
        self._compiled = compilations()


def blank_pool(shape: tuple[int, int], width: int, config: EngineConfig) -> decode.Pool:
    """A pool of nobody, in host arrays."""
    dtypes = {'active': bool, 'seed': np.uint32, 'temperature': np.float32, 'top_p': np.float32, 'min_p': np.float32, 'bias': np.float32}
    filled = {'bias_ids': -1, 'stop_ids': -1}
    more = {'table': (width,), 'stop_ids': (config.max_stop_ids,), 'bias_ids': (config.max_bias,), 'bias': (config.max_bias,)}
    names = [field.name for field in dataclasses.fields(decode.Pool)]
    arrays: list[Any] = [np.full((*shape, *more.get(name, ())), filled.get(name, 0), dtypes.get(name, np.int32)) for name in names]
    return decode.Pool(*arrays)


def _rows(drawn: decode.Drawn, shard: int, index: int, count: int):
    """One member's ids, log-probs, entropies and most likely (id, log-prob) pairs, as lists."""
    ids, logprobs, entropies, top_ids, top_logprobs = (
        [] if x is None else x[shard, index, :count].tolist()
        for x in (drawn.ids, drawn.logprobs, drawn.entropies, drawn.top_ids, drawn.top_logprobs))
    return ids, logprobs, entropies, [tuple(zip(*pair, strict=True)) for pair in zip(top_ids, top_logprobs, strict=True)]
