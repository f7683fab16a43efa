"""How one token is drawn, and the log-prob that the trainer will recompute for it."""

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array, num_valid: int) -> tuple[jax.Array, jax.Array]:
    """Draws one id a row.

    Args:
      logits: float32 [B, V].
      keys: PRNG keys [B], one a row, so that a row's draw depends on no neighbour.
      temperature: float32 [B]; 0 takes the arg-max.
      num_valid: ids that the tokenizer can decode; the others are never drawn and have no share in the softmax.

    Returns: ids int32 [B] and log-probs float32 [B] under log-softmax(logits / temperature), with temperature 1 for greedy rows. A row
    with non-finite logits gets id -1 and log-prob NaN: never a made-up token.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < num_valid, logits, -jnp.inf)
    scale = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    logprobs = jax.nn.log_softmax(logits / scale)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    ids = jnp.argmax(jnp.where(temperature[:, None] > 0, logprobs + noise, logits), axis=-1).astype(jnp.int32)
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == ids[:, None], logprobs, 0.0), axis=-1)
    finite = jnp.isfinite(logits[:, :num_valid]).all(-1)
    return jnp.where(finite, ids, -1), jnp.where(finite, chosen, jnp.nan)


def token_keys(seeds: jax.Array, samples: jax.Array, position: jax.Array) -> jax.Array:
    """PRNG keys [B] as a function of (seed, sample index, position in the completion) alone."""

    def key(seed, sample, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)

    return jax.vmap(key)(seeds, samples, position)
