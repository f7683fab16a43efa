"""Token statistics of the LM head without its logits: log-prob, entropy and log-sum-exp from one pass over blocks of the vocabulary.

Logits of 49,152 positions over 151,936 ids would take 29.9 GB in float32. Here a block of them lives at a time, in the forward and in the
backward pass (own gradient, logits recomputed), so memory grows with T and with V but never with T x V. Each device works on its own
positions and its own vocabulary shard; weights are gathered, and their gradients scattered, one block at a time.

Letters: n positions of one device, v vocabulary rows of one device, D embed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qedjax.sharding import spec

NEGATIVE = -1e30
BLOCK_VALUES = 2**24  # logits alive at a time on a device: 64 MB in float32
MIN_BLOCK = 1024  # narrower matrix products would starve an accelerator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Per position, float32 [B, T], all of log-softmax(logits / temperature) over the ids below num_valid.

    Attributes:
      logprob: of the target id.
      entropy: of the whole distribution, in nats.
      logsumexp: of logits / temperature.
    """

    logprob: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


def token_stats(x: jax.Array, head: jax.Array, targets: jax.Array, *, num_valid: int | None = None, temperature: float = 1.0,
                block: int | None = None) -> TokenStats:
    """Statistics of the next-token distribution at every position; differentiable in x and head.

    Args:
      x: final hidden states [B, T, D], sharded over batch and sequence; its dtype is that of the matrix products.
      head: LM-head weight [V, D], sharded over vocab and embed.
      targets: int32 [B, T], each below num_valid.
      num_valid: ids that the tokenizer can decode; padded rows of the head are left out of the softmax. None is all V.
      temperature: divides the logits.
      block: vocabulary rows a block; None bounds the logits alive to BLOCK_VALUES.

    Products accumulate in float32. Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f'temperature must be positive to define log-probabilities, not {temperature}')
    x = jax.reshard(x, spec('batch', 'sequence', None))
    head, targets = jax.reshard(head, spec('vocab', 'embed')), jax.reshard(targets, spec('batch', 'sequence'))
    return _token_stats(x, head, targets, num_valid or head.shape[0], float(temperature), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_stats(x, head, targets, num_valid, temperature, block):
    return _forward(x, head, targets, num_valid, temperature, block)[0]


def _forward(x, head, targets, num_valid, temperature, block):
    rows, hidden, table = spec('batch', 'sequence'), spec('batch', 'sequence', None), spec('vocab', 'embed')
    local = functools.partial(_local_forward, num_valid=num_valid, temperature=temperature, block=block, axes=table)
    stats = jax.shard_map(local, in_specs=(hidden, table, rows), out_specs=TokenStats(rows, rows, rows), check_vma=False)(
        x, head, targets)
    return stats, (x, head, targets, stats)


def _backward(num_valid, temperature, block, residuals, cotangents):
    rows, hidden, table = spec('batch', 'sequence'), spec('batch', 'sequence', None), spec('vocab', 'embed')
    others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis not in jax.tree.leaves(tuple(table)))
    local = functools.partial(_local_backward, num_valid=num_valid, temperature=temperature, block=block, axes=table, others=others)
    stats = TokenStats(rows, rows, rows)
    d_x, d_head = jax.shard_map(local, in_specs=(hidden, table, rows, stats, stats), out_specs=(hidden, table), check_vma=False)(
        *residuals, cotangents)
    return d_x, d_head, None


_token_stats.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The vocabulary shard of this device, block by block. The last block starts early and masks the rows already seen."""

    head: jax.Array  # [v, D / fsdp]
    size: int
    num_valid: int
    temperature: float
    vocab_axis: str | None
    embed_axis: str | None

    @property
    def count(self) -> int:
        return -(-self.head.shape[0] // self.size)

    def start(self, i: jax.Array) -> jax.Array:
        return jnp.minimum(i * self.size, self.head.shape[0] - self.size)

    def weights(self, i: jax.Array, dtype) -> jax.Array:
        """Rows of block i, whole: [size, D]."""
        rows = jax.lax.dynamic_slice_in_dim(self.head, self.start(i), self.size).astype(dtype)
        return jax.lax.all_gather(rows, self.embed_axis, axis=1, tiled=True) if self.embed_axis else rows

    def logits(self, i: jax.Array, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Masked logits / temperature [n, size] in float32 and the vocabulary ids [size] of their columns."""
        rows = self.start(i) + jnp.arange(self.size)
        offset = jax.lax.axis_index(self.vocab_axis) * self.head.shape[0] if self.vocab_axis else 0
        ids = rows + offset
        logits = jnp.einsum('nD,vD->nv', x, weights, preferred_element_type=jnp.float32) / self.temperature
        return jnp.where((rows >= i * self.size) & (ids < self.num_valid), logits, NEGATIVE), ids


def _blocks(x, head, num_valid, temperature, block, axes) -> tuple[_Blocks, jax.Array]:
    x = x.reshape(-1, x.shape[-1])
    size = block or max(BLOCK_VALUES // len(x) // 128 * 128, MIN_BLOCK)
    return _Blocks(head, min(size, head.shape[0]), num_valid, temperature, *axes), x


def _local_forward(x, head, targets, *, num_valid, temperature, block, axes):
    blocks, flat = _blocks(x, head, num_valid, temperature, block, axes)
    target = targets.reshape(-1, 1)

    def step(carry, i):
        # total = sum exp(z - highest); weighted = sum exp(z - highest) (z - highest): entropy without cancellation of large logits.
        highest, total, weighted, found = carry
        logits, ids = blocks.logits(i, flat, blocks.weights(i, flat.dtype))
        new_highest = jnp.maximum(highest, logits.max(-1))
        shifted = logits - new_highest[:, None]
        weights = jnp.where(logits > NEGATIVE, jnp.exp(shifted), 0.0)
        total, weighted = _rescale(highest - new_highest, total, weighted)
        found += jnp.sum(jnp.where((ids == target) & (logits > NEGATIVE), logits, 0.0), -1)
        return (new_highest, total + weights.sum(-1), weighted + jnp.sum(weights * shifted, -1), found), None

    zeros = jnp.zeros(len(flat))
    (highest, total, weighted, found), _ = jax.lax.scan(step, (zeros + NEGATIVE, zeros, zeros, zeros), jnp.arange(blocks.count))
    if blocks.vocab_axis:
        overall = jax.lax.pmax(highest, blocks.vocab_axis)
        total, weighted = _rescale(highest - overall, total, weighted)
        total, weighted, found = jax.lax.psum((total, weighted, found), blocks.vocab_axis)
        highest = overall
    stats = TokenStats(found - highest - jnp.log(total), jnp.log(total) - weighted / total, highest + jnp.log(total))
    return jax.tree.map(lambda s: s.reshape(targets.shape), stats)


def _rescale(shift: jax.Array, total: jax.Array, weighted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both sums after their reference logit has moved up by -shift (shift <= 0)."""
    decay = jnp.exp(shift)
    return total * decay, decay * (weighted + jnp.where(total > 0, shift, 0.0) * total)


def _local_backward(x, head, targets, stats, cotangents, *, num_valid, temperature, block, axes, others):
    blocks, flat = _blocks(x, head, num_valid, temperature, block, axes)
    target = targets.reshape(-1, 1)
    stats, d = (jax.tree.map(lambda s: s.reshape(-1, 1), tree) for tree in (stats, cotangents))

    def step(carry, i):
        d_x, d_head = carry
        weights = blocks.weights(i, flat.dtype)
        logits, ids = blocks.logits(i, flat, weights)
        logprobs = logits - stats.logsumexp
        probs = jnp.where(logits > NEGATIVE, jnp.exp(logprobs), 0.0)
        surprise = jnp.where(logits > NEGATIVE, logprobs + stats.entropy, 0.0)
        d_logits = probs * (d.logsumexp - d.logprob - d.entropy * surprise) + jnp.where(ids == target, d.logprob, 0.0)
        d_logits = (jnp.where(logits > NEGATIVE, d_logits, 0.0) / temperature).astype(flat.dtype)
        d_x += jnp.einsum('nv,vD->nD', d_logits, weights, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum('nv,nD->vD', d_logits, flat, preferred_element_type=jnp.float32)
        if blocks.embed_axis:
            d_weights = jax.lax.psum_scatter(d_weights, blocks.embed_axis, scatter_dimension=1, tiled=True)
        rows = jax.lax.dynamic_slice_in_dim(d_head, blocks.start(i), blocks.size) + d_weights
        return (d_x, jax.lax.dynamic_update_slice_in_dim(d_head, rows, blocks.start(i), 0)), None

    start = (jnp.zeros(flat.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (d_x, d_head), _ = jax.lax.scan(step, start, jnp.arange(blocks.count))
    if blocks.vocab_axis:
        d_x = jax.lax.psum(d_x, blocks.vocab_axis)
    d_head = jax.lax.psum(d_head, others)
    return d_x.reshape(x.shape).astype(x.dtype), d_head.astype(head.dtype)
