"""Losses over packed rows: pure functions (model, batch) -> (sum of weighted losses, sums of metrics)."""

import jax
import jax.numpy as jnp

from qedjax.model.transformer import Transformer
from qedjax.train.lm_head import token_stats
from qedjax.types import TrainBatch


def next_token_loss(model: Transformer, batch: TrainBatch, num_valid: int | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of the targets, weighted; with the entropy of the predictions at the same positions, in nats."""
    x = model(batch.tokens, batch.positions, batch.segment_ids)
    stats = token_stats(x, model.head, batch.targets, num_valid=num_valid)
    loss = -jnp.sum(jnp.where(batch.weights > 0, stats.logprob * batch.weights, 0.0))
    return loss, {'entropy': jnp.sum(stats.entropy * batch.weights)}
