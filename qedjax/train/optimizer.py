"""Optimizers and schedules by config, on optax; float32 moments always, float32 masters or bfloat16 with stochastic rounding.

At the recipe's learning rate of 1e-6 an update is about a thousandth of bfloat16's spacing: rounded to nearest, parameters never move.
Rounded up or down at random, in proportion, they move right on average (Gupta et al. 2015, arXiv 1502.02551).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ('adamw', 'adafactor', 'lion', 'sgd')
SCHEDULES = ('constant', 'cosine', 'linear')


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """One optimizer with its schedule.

    Attributes:
      name: 'adamw', 'adafactor' (memory: one row and one column a matrix), 'lion', 'sgd' (with momentum b1).
      learning_rate: peak.
      schedule: after the warm-up: 'constant', 'cosine' or 'linear' down to final_fraction of the peak at the last step.
      warmup_fraction: share of all steps that rise linearly from 0.
      final_fraction: learning rate of the last step over the peak.
      b1, b2, eps: moments (b2 and eps as the optimizer defines them).
      weight_decay: decoupled; on matrices only, never on norms and biases.
      clip_norm: global norm of the gradient is clipped to it; 0 is off.
    """

    name: str = 'adamw'
    learning_rate: float = 3e-5
    schedule: str = 'cosine'
    warmup_fraction: float = 0.03
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def validate(cfg: OptimizerConfig) -> None:
    """Raises ValueError, in one sentence, for an optimizer that cannot be built."""
    for field, choices in (('name', OPTIMIZERS), ('schedule', SCHEDULES)):
        if getattr(cfg, field) not in choices:
            raise ValueError(f'optimizer.{field} is {getattr(cfg, field)!r}; choose one of {", ".join(choices)}')
    for name, most in (('learning_rate', math.inf), ('warmup_fraction', 1), ('final_fraction', math.inf),
                       ('weight_decay', math.inf), ('clip_norm', math.inf)):
        if not (0 <= getattr(cfg, name) <= most and math.isfinite(getattr(cfg, name))):
            raise ValueError(f'optimizer.{name} is {getattr(cfg, name)}; it must be a number from 0 to {most}')
    for name in ('b1', 'b2'):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f'optimizer.{name} is {getattr(cfg, name)}; it must be at least 0 and below 1')
    if not 0 < cfg.eps < 1:
        raise ValueError(f'optimizer.eps is {cfg.eps}; it must be between 0 and 1, since parameters without a gradient would become 0 / 0')


def make_schedule(cfg: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate of update number 0 .. steps - 1. The warm-up's first update already moves: rates are (i + 1) / warm-up."""
    warmup = round(cfg.warmup_fraction * steps)
    final, rest = cfg.learning_rate * cfg.final_fraction, max(steps - warmup - 1, 1)
    decay = {
        'constant': optax.constant_schedule(cfg.learning_rate),
        'cosine': optax.cosine_decay_schedule(cfg.learning_rate, rest, cfg.final_fraction),
        'linear': optax.linear_schedule(cfg.learning_rate, final, rest),
    }[cfg.schedule]
    if not warmup:
        return decay
    return lambda count: jnp.where(count < warmup, cfg.learning_rate * (count + 1) / warmup, decay(count - warmup))


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation (without clipping, which the step does on the norm that it reports)."""
    validate(cfg)
    schedule = make_schedule(cfg, steps)
    decay = optax.add_decayed_weights(cfg.weight_decay, mask=decays) if cfg.weight_decay else optax.identity()
    scale = {
        'adamw': lambda: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        'adafactor': lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        'lion': lambda: optax.scale_by_lion(cfg.b1, cfg.b2),
        'sgd': lambda: optax.trace(cfg.b1),
    }[cfg.name]()
    return optax.chain(scale, decay, optax.scale_by_learning_rate(schedule))


def decays(params):
    """Tree of bools: True for matrices (named w*, embed or lm_head), False for norm scales and biases."""

    def is_matrix(path, _):
        name = next(key for key in reversed([getattr(k, 'name', getattr(k, 'key', None)) for k in path]) if isinstance(key, str)
                    and key != 'value')
        return name.startswith('w') or name in ('embed', 'lm_head')

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def to_float32(tree):
    """The tree in float32: what optimizers see, so that moments of bfloat16 parameters are float32 too."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def apply_updates(params, updates, key: jax.Array):
    """params + updates; float32 parameters exactly, bfloat16 ones rounded stochastically with bits from `key`."""
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(key, len(leaves))

    def apply(param, update, key):
        total = param.astype(jnp.float32) + update
        return stochastic_round(total, key) if param.dtype == jnp.bfloat16 else total.astype(param.dtype)

    applied = [apply(*args) for args in zip(leaves, jax.tree.leaves(updates), keys, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), applied)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, to one of the two neighbours with the probability that makes the mean exact."""
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding.spec).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    truncated = bits & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(truncated, jnp.float32).astype(jnp.bfloat16)
