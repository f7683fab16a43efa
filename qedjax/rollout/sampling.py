"""How one token is drawn, and the log-prob that the trainer will recompute for it.

The log-prob is that of the whole distribution, log-softmax(logits / temperature) over the ids that the tokenizer can decode. Top-k, top-p,
min-p, biases and bans bear on the choice alone. Thresholds are found by bisection over the order of floats rather than by sorting the
vocabulary: 32 reductions, exact, and only in batches where some row asks for them.
"""

import dataclasses
from typing import Any  # of a Choice whose fields are known to be there

import jax
import jax.numpy as jnp

PRNG = 'threefry2x32'  # whatever JAX's default: under vmap, draws of the hardware generators depend on the neighbours
LOW, HIGH = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What each row asks of its choice, see SamplingParams: [B], and banned_ids, bias_ids and bias [B, n], where an id of -1 pads.

    Without top_k, top_p and min_p, or without the last three, a program has no code for them and compiles sooner.
    """

    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    banned_ids: jax.Array | None = None
    bias_ids: jax.Array | None = None
    bias: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Ids int32 [B] with their log-probs [B]; entropies [B] in nats, and the most likely ids with theirs [B, n], where asked for."""

    ids: jax.Array
    logprobs: jax.Array
    entropies: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


def sample(logits: jax.Array, keys: jax.Array, choice: Choice, num_valid: int, *, top: int = 0, entropy: bool = False) -> Draw:
    """Draws one id a row.

    Args:
      logits: float32 [B, V], whole on every device.
      keys: PRNG keys [B], one a row, so that a row's draw depends on no neighbour.
      choice: a temperature of 0 takes the arg-max, and log-probs are then those of temperature 1.
      num_valid: ids that the tokenizer can decode; the others are never drawn and have no share in the softmax.
      top, entropy: how many most likely ids to report, and whether to report the entropy.

    A row with non-finite logits, or with nothing left to choose, gets id -1 and log-prob NaN: never a made-up token.
    """
    ids = jnp.arange(logits.shape[-1])
    valid = ids < num_valid
    logits = jnp.where(valid, logits, -jnp.inf)
    scale = jnp.where(choice.temperature > 0, choice.temperature, 1.0)[:, None]
    logprobs = jax.nn.log_softmax(logits / scale)
    scores = logprobs
    if choice.bias_ids is not None:
        scores = jax.lax.cond(_any_edit(choice), _edit, lambda scores, _: scores, scores, choice)
    if choice.top_k is not None:
        scores = jax.lax.cond(_any_cut(choice), _cut, lambda scores, _: scores, scores, choice)
    scores = jax.lax.cond(jnp.any(choice.temperature > 0), _add_noise, lambda scores, *_: scores, scores, keys, choice.temperature)
    chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    here = ids == chosen[:, None]
    good = jnp.isfinite(jnp.where(valid, logits, 0)).all(-1) & (jnp.where(here, scores, -jnp.inf).max(-1) > -jnp.inf)
    logprob = jnp.where(good, jnp.where(here, logprobs, 0).sum(-1), jnp.nan)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, top) if top else (None, None)
    entropies = -jnp.where(valid, jnp.exp(logprobs) * logprobs, 0).sum(-1) if entropy else None
    return Draw(jnp.where(good, chosen, -1), logprob, entropies, top_ids, top_logprobs)


def token_keys(seeds: jax.Array, samples: jax.Array, position: jax.Array) -> jax.Array:
    """PRNG keys [B] as a function of (seed, sample index, position in the completion) alone."""

    def key(seed, sample, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl=PRNG), sample), position)

    return jax.vmap(key)(seeds, samples, position)


def _any_edit(choice: Any) -> jax.Array:
    return jnp.any(choice.bias_ids >= 0) | jnp.any(choice.banned_ids >= 0)


def _edit(scores: jax.Array, choice: Any) -> jax.Array:
    """Adds biases, which are of logits, and bans ids."""
    ids = jnp.arange(scores.shape[-1])
    scale = jnp.where(choice.temperature > 0, choice.temperature, 1.0)[:, None]
    for i in range(choice.bias_ids.shape[1]):
        scores += jnp.where(ids == choice.bias_ids[:, i, None], choice.bias[:, i, None] / scale, 0.0)
    for i in range(choice.banned_ids.shape[1]):
        scores += jnp.where(ids == choice.banned_ids[:, i, None], -jnp.inf, 0.0)
    return scores


def _any_cut(choice: Any) -> jax.Array:
    return jnp.any(((choice.top_k > 0) | (choice.top_p < 1) | (choice.min_p > 0)) & (choice.temperature > 0))


def _cut(scores: jax.Array, choice: Any) -> jax.Array:
    """Leaves the top k of scores [B, V], then the fewest of those that hold top_p of their mass, then those within min_p of the best."""

    def cut(scores):
        k = jnp.where(choice.top_k > 0, choice.top_k, scores.shape[-1]).astype(jnp.float32)
        kept = _keep(scores, jnp.ones_like(scores), k)
        mass = jnp.where(kept, jax.nn.softmax(scores), 0)
        kept &= _keep(scores, mass, jnp.where(choice.top_p < 1, jnp.maximum(choice.top_p * mass.sum(-1), 1e-30), jnp.inf))  # the best stays
        best = jnp.where(kept, scores, -jnp.inf).max(-1, keepdims=True)
        kept &= scores >= best + jnp.log(choice.min_p)[:, None]
        return jnp.where(kept, scores, -jnp.inf)

    return jnp.where((choice.temperature > 0)[:, None], cut(scores), scores)


def _keep(scores: jax.Array, weight: jax.Array, least: jax.Array) -> jax.Array:
    """Mask of the highest scores [B, V], the fewest (ties aside) whose weights [B, V] come to `least` [B]: all if they never do.

    Bisects for the highest threshold that is low enough, over integers that are ordered like the floats.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    order = jnp.where(bits < 0, LOW - bits - 1, bits)  # negative floats count down; both zeros are neighbours

    def halve(_, bounds):
        low, high = bounds  # weights from `low` on come to `least`, or low is LOW; those from `high` on do not, or high is HIGH
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.where(order >= middle[:, None], weight, 0).sum(-1) >= least
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.full_like(order[:, 0], LOW), jnp.full_like(order[:, 0], HIGH)
    return order >= jax.lax.fori_loop(0, 32, halve, start)[0][:, None]


def _add_noise(scores: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """Gumbel noise for the rows that are not greedy: the arg-max is then a draw."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[-1:]))(keys)
    return jnp.where(temperature[:, None] > 0, scores + noise, scores)
