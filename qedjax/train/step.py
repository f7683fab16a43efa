"""The train state and the one compiled step: accumulation, global normalisation, clipping, and what happens to a NaN."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from qedjax.model.transformer import Transformer
from qedjax.sharding import put
from qedjax.train.optimizer import apply_updates, to_float32
from qedjax.types import TrainBatch

# loss_fn(model, micro_batch) -> (sum of weighted losses, sums of metrics); both are divided by the weight of the whole batch.
LossFn = Callable[[Transformer, TrainBatch], tuple[jax.Array, dict[str, jax.Array]]]

# By default libtpu runs each collective of a step alone on v5e. These let it gather weights in parts beside matrix products. It refuses
# them on other chips, where its versions differ in what they do by default.
GATHERS = ('xla_tpu_enable_async_collective_fusion', 'xla_tpu_enable_async_collective_fusion_fuse_all_gather',
           'xla_tpu_enable_async_collective_fusion_multiple_steps', 'xla_tpu_overlap_compute_collective_tc', 'xla_enable_async_all_gather')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: batches consumed; also the position in the data.
      model, opt_state: parameters and the optimizer's state.
      skipped: updates skipped in all because the loss or the gradient was not finite.
      skipped_in_a_row: the latest of those without a good step since.
    """

    step: jax.Array
    model: Transformer
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around a model. Call it inside jit (see sharding.create), so that the optimizer's state is sharded at birth."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, model, optimizer.init(to_float32(model)), zero, zero)


def place_batch(batch: TrainBatch, mesh: Mesh, accumulation: int) -> TrainBatch:
    """Host batch [B, T] -> global arrays [A, B / A, T], rows of each micro-batch spread over the data axes."""
    micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)
    return put(micro, mesh, None, 'batch', 'sequence')


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """What to tell the compiler of a train step for these devices."""
    return dict.fromkeys(GATHERS, True) if mesh.devices.flat[0].device_kind == 'TPU v5 lite' else None


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, clip_norm: float, seed: int,
                    options: dict[str, bool] | None = None):
    """Builds step(state, batch) -> (state, metrics); jitted, and the old state's buffers are reused.

    Args:
      loss_fn: sums over one micro-batch.
      optimizer: from make_optimizer.
      clip_norm: global gradient norm to clip to; 0 is off.
      seed: of the run; stochastic rounding folds the step into its key.
      options: see compiler_options.

    The batch is [A, B, T]. Loss and gradient are divided once, by the weight of all A x B rows, so they do not depend on how rows are
    spread over micro-batches and devices. A step with a non-finite loss or gradient, or without any weight, changes nothing but the
    counters; the first kind is counted as skipped.
    """

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        zeros = _zero_sums(loss_fn, state.model, jax.tree.map(lambda x: x[0], batch))
        sums, _ = jax.lax.scan(lambda sums, rows: (_add_micro(loss_fn, state.model, sums, rows), None), zeros, batch)
        weight = batch.weights.sum()
        (loss, metrics), grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-6), sums)
        return _update(state, loss, metrics | {'weight': weight}, grads, weight > 0, optimizer, clip_norm, seed)

    return jax.jit(step, donate_argnums=0, compiler_options=options)


def make_summed_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, clip_norm: float, seed: int,
                     options: dict[str, bool] | None = None):
    """Builds step(state, micro_batches) -> (state, metrics) for any number of micro-batches [B, T], each a batch on the devices.

    As make_train_step, but nothing is divided: the weights of the rows hold the whole normaliser, and metrics are sums. Three programs
    serve every number of micro-batches, so none is compiled for a number that has not been seen.
    """
    zero, add, apply = summed_programs(loss_fn, optimizer, clip_norm, seed, options)

    def step(state: TrainState, micro_batches: Sequence[TrainBatch]) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = zero(state.model, micro_batches[0])
        for rows in micro_batches:
            sums = add(state.model, sums, rows)
        return apply(state, sums)

    return step


def summed_programs(loss_fn: LossFn, optimizer: optax.GradientTransformation, clip_norm: float, seed: int,
                    options: dict[str, bool] | None = None):
    """The programs of make_summed_step: zero(model, rows) -> sums, add(model, sums, rows) -> sums, apply(state, sums) -> (state, metrics).

    Sums are ((loss, metrics), gradient); `add` reuses their buffers, `apply` those of the state.
    """
    def apply(state, sums):
        (loss, metrics), grads = sums
        return _update(state, loss, metrics, grads, jnp.bool_(True), optimizer, clip_norm, seed)

    zero = jax.jit(lambda model, rows: _zero_sums(loss_fn, model, rows))
    add = jax.jit(lambda model, sums, rows: _add_micro(loss_fn, model, sums, rows), donate_argnums=1, compiler_options=options)
    return zero, add, jax.jit(apply, donate_argnums=0)


def _zero_sums(loss_fn: LossFn, model: Transformer, rows: TrainBatch):
    like = jax.eval_shape(lambda: _micro(loss_fn, model, rows))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), like)


def _add_micro(loss_fn: LossFn, model: Transformer, sums, rows: TrainBatch):
    return jax.tree.map(jnp.add, sums, _micro(loss_fn, model, rows))


def _micro(loss_fn: LossFn, model: Transformer, rows: TrainBatch):
    """((loss, metrics), gradient) of one micro-batch, all sums."""
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(model, rows)
    return value, to_float32(grads)


def _update(state: TrainState, loss, metrics, grads, useful, optimizer, clip_norm: float, seed: int):
    """The state after one update, or as it was but for the counters if that would not be finite or `useful` is False."""
    norm = optax.tree.norm(grads)
    if clip_norm:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)), grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, to_float32(state.model))
    model = apply_updates(state.model, updates, jax.random.fold_in(jax.random.key(seed), state.step))
    keep = finite & useful
    model, opt_state = jax.tree.map(lambda new, old: jnp.where(keep, new, old), (model, opt_state), (state.model, state.opt_state))
    bad = (~finite).astype(jnp.int32)
    state = TrainState(state.step + 1, model, opt_state, state.skipped + bad, (state.skipped_in_a_row + 1) * bad)
    return state, metrics | {'loss': loss, 'grad_norm': norm, 'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}


def make_eval_step(loss_fn: LossFn):
    """Builds eval_step(model, batch [A, B, T]) -> sums of loss and metrics, and the weight to divide them by."""

    def step(model: nnx.Module, batch: TrainBatch) -> dict[str, jax.Array]:
        def micro(_, rows):
            loss, metrics = loss_fn(model, rows)
            return None, metrics | {'loss': loss, 'weight': rows.weights.sum()}

        return jax.tree.map(lambda x: x.sum(), jax.lax.scan(micro, None, batch)[1])

    return jax.jit(step)
