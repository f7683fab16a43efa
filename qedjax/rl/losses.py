"""The objective of RL, token by token: pure functions of log-probs and advantages, all to be maximised.

l is the log-prob of a sampled id now, l_old when it was sampled, both under log-softmax(logits / temperature); rho = exp(l - l_old); A is
the advantage of its answer. Every array is [B, T].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qedjax.model.transformer import Transformer
from qedjax.rl.advantages import ADVANTAGES
from qedjax.sharding import spec
from qedjax.train.lm_head import token_stats
from qedjax.types import RLBatch

KL_CLIP = 5.0  # of l_ref - l, as the reference does
LOSSES = ('ppo', 'reinforce', 'cispo', 'gspo')
NORMALISERS = ('samples', 'tokens', 'sequences', 'constant', 'group')
OVERLONG = ('zero', 'mask', 'shaped')
ZERO_VARIANCE = ('keep', 'drop', 'refill')


@dataclasses.dataclass(unsafe_hash=True)
class ObjectiveConfig:
    """What is maximised; the defaults are the reference's (QED-Nano: PPO with eps 4, mean-centred, token sum over sample count).

    Attributes:
      loss: 'ppo', 'reinforce', 'cispo' or 'gspo', see the functions of this module.
      clip_low, clip_high: rho is clipped to [1 - clip_low, 1 + clip_high].
      ratio_cap: bounds rho * A below by ratio_cap * A where A < 0 ('ppo' and 'gspo'); 0 is off, as in the reference.
      kl_coef: of the KL penalty to the reference model; entropy_coef: of the entropy.
      advantage: 'mean', 'std' or 'loo', see rl.advantages.
      normaliser: weight of a token, see rl.batch.token_weights.
      overlong: answers cut by the budget are graded as they stand, 'zero'; left out of the loss, 'mask'; or their rewards fall over the
        last `overlong_buffer` tokens of the budget, 'shaped'.
      zero_variance: groups with equal rewards are trained (entropy only), 'keep'; left out, 'drop'; or replaced by others, 'refill'.
    """

    loss: str = 'ppo'
    clip_low: float = 4.0
    clip_high: float = 4.0
    ratio_cap: float = 0.0
    kl_coef: float = 0.0
    entropy_coef: float = 1e-4
    advantage: str = 'mean'
    normaliser: str = 'samples'
    overlong: str = 'zero'
    overlong_buffer: int = 0
    zero_variance: str = 'keep'


def validate(cfg: ObjectiveConfig) -> None:
    """Raises ValueError, in one sentence, for an objective that does not exist."""
    for name, choices in (('loss', LOSSES), ('advantage', tuple(ADVANTAGES)), ('normaliser', NORMALISERS), ('overlong', OVERLONG),
                          ('zero_variance', ZERO_VARIANCE)):
        if getattr(cfg, name) not in choices:
            raise ValueError(f'objective.{name} is {getattr(cfg, name)!r}; choose one of {", ".join(choices)}')
    for name in ('clip_low', 'clip_high', 'ratio_cap', 'kl_coef', 'entropy_coef', 'overlong_buffer'):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f'objective.{name} is {getattr(cfg, name)}; it must be a number that is not negative')
    if cfg.ratio_cap and cfg.ratio_cap <= 1:
        raise ValueError(f'objective.ratio_cap is {cfg.ratio_cap}; it must exceed 1, the ratio of unchanged weights, or be 0 for none')
    if cfg.overlong == 'shaped' and not cfg.overlong_buffer:
        raise ValueError("objective.overlong='shaped' needs objective.overlong_buffer, the tokens over which rewards fall")


def ppo(logprob: jax.Array, old: jax.Array, advantage: jax.Array, low: float, high: float, cap: float = 0.0) -> jax.Array:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347); where A < 0 at least cap A (dual clip, arXiv 1912.09729)."""
    return _clipped(jnp.exp(logprob - old), advantage, low, high, cap)


def reinforce(logprob: jax.Array, old: jax.Array, advantage: jax.Array, high: float) -> jax.Array:
    """l A stopgrad(min(rho, 1 + high)): REINFORCE with truncated importance weights (IMPALA, arXiv 1802.01561)."""
    return logprob * advantage * jax.lax.stop_gradient(jnp.minimum(jnp.exp(logprob - old), 1 + high))


def cispo(logprob: jax.Array, old: jax.Array, advantage: jax.Array, low: float, high: float) -> jax.Array:
    """l A stopgrad(clip(rho, 1 - low, 1 + high)): no token loses its gradient (MiniMax-M1, arXiv 2506.13585)."""
    return logprob * advantage * jax.lax.stop_gradient(jnp.clip(jnp.exp(logprob - old), 1 - low, 1 + high))


def gspo(logprob: jax.Array, old: jax.Array, advantage: jax.Array, answer_mean, low: float, high: float, cap: float = 0.0) -> jax.Array:
    """PPO on the ratio of whole answers, exp(mean of l - l_old over the answer), spread over their tokens (arXiv 2507.18071, eq. 13).

    `answer_mean` replaces each value by the mean over its answer.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(answer_mean(logprob - old)) + logprob - jax.lax.stop_gradient(logprob))
    return _clipped(ratio, advantage, low, high, cap)


def _clipped(ratio: jax.Array, advantage: jax.Array, low: float, high: float, cap: float) -> jax.Array:
    value = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    return jnp.where(advantage < 0, jnp.maximum(value, cap * advantage), value) if cap else value


def kl(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = clip(l_ref - l, -5, 5): never negative, unbiased before the clip (k3; Schulman 2020)."""
    d = jnp.clip(reference - logprob, -KL_CLIP, KL_CLIP)
    return jnp.exp(d) - d - 1


def rl_loss(model: Transformer, batch: RLBatch, cfg: ObjectiveConfig, temperature: float, num_valid: int | None = None
            ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus the weighted objective summed over a micro-batch, and sums over its trained tokens of what is reported (see summarise)."""
    x = model(batch.tokens, batch.positions, batch.segment_ids)
    stats = token_stats(x, model.head, batch.targets, num_valid=num_valid, temperature=temperature)
    mask = batch.weights > 0
    old, reference = (jnp.where(mask, values, stats.logprob) for values in (batch.logprobs, batch.references))
    value, clipped = policy_term(stats.logprob, old, batch, cfg)
    penalty = kl(stats.logprob, reference)
    value += cfg.entropy_coef * stats.entropy - cfg.kl_coef * penalty

    def total(values):
        return jnp.sum(jnp.where(mask, values, 0.0))

    difference = stats.logprob - old
    ratio = jnp.exp(difference)
    return -total(value * batch.weights), {
        'tokens': total(1.0), 'ratio': total(ratio), 'ratio_squared': total(ratio**2), 'log_ratio': total(jnp.abs(difference)),
        'clipped': total(clipped), 'entropy': total(stats.entropy), 'kl': total(penalty)}


def policy_term(logprob: jax.Array, old: jax.Array, batch: RLBatch, cfg: ObjectiveConfig) -> tuple[jax.Array, jax.Array]:
    """The objective of each token without KL and entropy, and whether its ratio lay outside the clip range."""
    clip = cfg.clip_low, cfg.clip_high
    difference = logprob - old
    if cfg.loss == 'gspo':
        difference = answer_means(difference, batch)
        value = gspo(logprob, old, batch.advantages, lambda x: answer_means(x, batch), *clip, cfg.ratio_cap)
    else:
        value = {'ppo': lambda: ppo(logprob, old, batch.advantages, *clip, cfg.ratio_cap),
                 'reinforce': lambda: reinforce(logprob, old, batch.advantages, cfg.clip_high),
                 'cispo': lambda: cispo(logprob, old, batch.advantages, *clip)}[cfg.loss]()
    ratio = jnp.exp(difference)
    return value, ((ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)).astype(jnp.float32)


def answer_means(values: jax.Array, batch: RLBatch) -> jax.Array:
    """[B, T] with each trained token's value replaced by the mean over the trained tokens of its answer; 0 elsewhere."""
    def row(values, weights, segments):
        own = jnp.where(weights > 0, segments, 0)
        sums, counts = (jax.ops.segment_sum(x, own, len(segments) + 1) for x in (values, jnp.ones_like(values)))
        return jnp.where(own > 0, (sums / jnp.maximum(counts, 1))[own], 0.0)

    whole = spec('batch', None)
    inputs = (jax.reshard(x, whole) for x in (values, batch.weights, batch.segment_ids))
    means = jax.shard_map(jax.vmap(row), in_specs=(whole,) * 3, out_specs=whole, check_vma=False)(*inputs)
    return jax.reshard(means, spec('batch', 'sequence'))


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """What is reported of a step, from sums over its trained tokens: means; the effective sample size as a share of the tokens."""
    tokens = max(sums['tokens'], 1.0)
    means = {name: sums[name] / tokens for name in ('ratio', 'log_ratio', 'clipped', 'entropy', 'kl')}
    ess = sums['ratio'] ** 2 / max(sums['ratio_squared'] * tokens, 1e-30)
    return means | {'ess': ess, 'trained_tokens': sums['tokens']}
