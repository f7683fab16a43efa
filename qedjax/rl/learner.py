"""The learner: graded groups in, one update out. Compiled once, whatever the lengths of the answers."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rl.batch import Sample, make_samples, pack, varied
from qedjax.rl.config import RLConfig
from qedjax.rl.losses import rl_loss, summarise
from qedjax.sharding import put
from qedjax.train.lm_head import token_stats
from qedjax.train.optimizer import make_optimizer
from qedjax.train.step import TrainState, compiler_options, init_state, make_summed_step
from qedjax.types import Group, RLBatch


class Learner:
    """Makes updates from groups.

    Args:
      cfg: the run.
      model_config: of the policy, as it is trained.
      mesh: to train on.
      num_valid: ids that the tokenizer can decode.
      reference: model of the KL penalty, on the same mesh; None without one.
    """

    def __init__(self, cfg: RLConfig, model_config: ModelConfig, mesh: Mesh, num_valid: int, reference: Transformer | None = None):
        self.cfg, self.mesh, self.reference = cfg, mesh, reference
        self.tx = make_optimizer(cfg.optimizer, cfg.steps)
        loss = functools.partial(rl_loss, cfg=cfg.objective, temperature=cfg.temperature, num_valid=num_valid)
        self._loss = loss
        self._step = make_summed_step(loss, self.tx, cfg.optimizer.clip_norm, cfg.seed, compiler_options(mesh))
        self._logprobs = jax.jit(functools.partial(reference_logprobs, temperature=cfg.temperature, num_valid=num_valid))
        self._documents = 1 if model_config.attention == 'cudnn' else None  # its kernel knows no segments

    def init(self, model: Transformer) -> TrainState:
        """A fresh state around a model, whose buffers it takes over."""
        with jax.set_mesh(self.mesh):
            return jax.jit(init_state, static_argnums=1, donate_argnums=0)(model, self.tx)

    def fresh(self, model_config: ModelConfig) -> TrainState:
        """The same from random weights: for its shapes."""
        return init_state(Transformer(model_config, jax.random.key(0)), self.tx)

    def trace(self, model_config: ModelConfig) -> None:
        """Traces a step: raises ValueError for a mesh or an attention backend that this model and these rows cannot use."""
        rows, = pack([Sample((0,), (0,), (0.0,), 0.0, 1.0)], self.cfg.row_length, self.cfg.micro_rows)
        gradient = jax.grad(self._loss, has_aux=True)
        with jax.set_mesh(self.mesh):
            jax.eval_shape(lambda rows: gradient(Transformer(model_config, jax.random.key(0)), rows), self._place(rows))

    def step(self, state: TrainState, groups: Sequence[Group]) -> tuple[TrainState, dict[str, float]]:
        """One update. Without a single answer to train, only the step counter moves."""
        samples = make_samples(groups, self.cfg.objective, self.cfg.max_tokens)
        batches = pack(samples, self.cfg.row_length, self.cfg.micro_rows, self._documents)
        if not batches:
            return _advance(state), {}
        with jax.set_mesh(self.mesh):
            placed = [self._place(batch) for batch in batches]
            state, metrics = self._step(state, placed)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        used = sum(map(len, samples)) / (len(batches) * self.cfg.micro_rows * self.cfg.row_length)
        return state, summarise(values) | {name: values[name] for name in ('loss', 'grad_norm', 'skipped', 'skipped_in_a_row')} | {
            'rows': len(batches) * self.cfg.micro_rows, 'packing': used}

    def _place(self, batch: RLBatch) -> RLBatch:
        placed = put(batch, self.mesh, 'batch', 'sequence')
        if self.reference is None:
            return placed
        return RLBatch(**(vars(placed) | {'references': self._logprobs(self.reference, placed)}))


@functools.partial(jax.jit, donate_argnums=0)
def _advance(state: TrainState) -> TrainState:
    return TrainState(state.step + 1, state.model, state.opt_state, state.skipped, jnp.zeros_like(state.skipped_in_a_row))


def reference_logprobs(model: Transformer, batch: RLBatch, temperature: float, num_valid: int) -> jax.Array:
    """Log-probs [B, T] of the predicted ids under another model."""
    x = model(batch.tokens, batch.positions, batch.segment_ids)
    return token_stats(x, model.head, batch.targets, num_valid=num_valid, temperature=temperature).logprob


def describe(groups: Sequence[Group], cfg: RLConfig, version: int) -> dict[str, float]:
    """What is reported of the groups of a step, before they are trained."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    lengths = [len(rollout.completion.ids) for rollout in rollouts]
    lags = [version - group.oldest_version for group in groups]
    return {
        'reward': float(np.mean(rewards)) if rewards else float('nan'),
        'full_marks': float(np.mean([reward == 1 for reward in rewards])) if rewards else float('nan'),
        'ungraded': 1 - len(rewards) / max(len(rollouts), 1),
        'no_answer': float(np.mean([not rollout.answer.strip() for rollout in rollouts])),
        'truncated': float(np.mean([rollout.completion.finish_reason == 'length' for rollout in rollouts])),
        'tokens': float(np.mean(lengths)), 'tokens_max': max(lengths),
        'zero_variance': float(np.mean([not varied(group, cfg.objective, cfg.max_tokens) for group in groups])),
        'lag_max': max(lags), 'lag_mean': float(np.mean(lags)),
    }
