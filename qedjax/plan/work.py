"""The work of a micro-batch and of decoding, counted from the model's shape: FLOPs, bytes through HBM, bytes between devices.

These are what the layout needs; what a compiled program does is read from it (costs.py, collectives.py) and compared with them.
"""

import dataclasses

import jax.numpy as jnp

from qedjax.model.config import ModelConfig
from qedjax.plan.chips import Slice
from qedjax.plan.memory import kv_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device, in one call: `model_flops` without, `flops` with what is computed anew; `sent` by kind of collective."""

    model_flops: float
    flops: float
    hbm: float
    sent: dict[str, float]
    link_seconds: float

    def times(self, n: float) -> 'Work':
        return Work(self.model_flops * n, self.flops * n, self.hbm * n, {k: v * n for k, v in self.sent.items()}, self.link_seconds * n)

    def plus(self, other: 'Work') -> 'Work':
        sent = {kind: self.sent.get(kind, 0.0) + other.sent.get(kind, 0.0) for kind in {**self.sent, **other.sent}}
        return Work(self.model_flops + other.model_flops, self.flops + other.flops, self.hbm + other.hbm, sent,
                    self.link_seconds + other.link_seconds)

    def seconds(self, slice: Slice) -> dict[str, float]:
        """Least time in products, in HBM and on links, if each ran at its peak."""
        chip = slice.chip
        return {'compute': self.flops / chip.flops, 'HBM': self.hbm / chip.hbm_bandwidth, 'links': self.link_seconds}


def micro_batch(model: ModelConfig, sizes: dict[str, int], slice: Slice, rows: int, length: int) -> Work:
    """Forward and backward pass of `rows` rows, one document each."""
    devices = sizes['data'] * sizes['fsdp'] * sizes['context'] * sizes['tensor']
    positions = rows * length / devices * sizes['tensor']  # of a device; its tensor group shares each
    sent, seconds = _sent(model, sizes, slice, positions)
    return Work(rows * length * model.flops_per_token(length) / devices, executed_flops(model, rows, length) / devices,
                _train_hbm(model, sizes, positions), sent, seconds)


def executed_flops(model: ModelConfig, rows: int, length: int) -> float:
    """FLOPs of a micro-batch with what is computed anew: products of layers by policy, logits once, scores of attention.

    The model counts 2 products of attention forward and 4 backward; backward kernels do 5. cuDNN's runs forward once more unless all is
    kept.
    """
    head = 2 * model.vocab_size * model.embed_dim
    matrices = 2 * (model.num_params - model.vocab_size * model.embed_dim * (1 if model.tie_embeddings else 2))
    product = model.num_layers * model.num_heads * model.head_dim * length  # of one causal product a token
    again = {'full': 1.0, 'attention': 1.0, 'dots': 0.0, 'none': 0.0}[model.remat]
    down = 2 * model.num_layers * model.mlp_dim * model.embed_dim  # nothing in the backward pass needs its result
    attention = 2 + 5 + 2 * (model.remat == 'full' or (model.attention == 'cudnn' and model.remat != 'none'))
    return rows * length * (4 * head + 3 * matrices + again * (matrices - down) + attention * product)


def _train_hbm(model: ModelConfig, sizes: dict[str, int], positions: float) -> float:
    """Estimate: weights written and read once a pass, gradients, and each activation of a layer written and read in each pass."""
    item, tensor = jnp.dtype(model.dtype).itemsize, sizes['tensor']
    shard = model.num_params / (sizes['fsdp'] * tensor)
    weights = 3 * 2 * item * model.num_params / tensor + (4 + item) * shard + 3 * 4 * shard
    width = 6 * model.embed_dim + (3 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim / tensor + 3 * model.mlp_dim / tensor
    return weights + 2 * item * 4 * model.num_layers * positions * width


def _sent(model: ModelConfig, sizes: dict[str, int], slice: Slice, positions: float) -> tuple[dict[str, float], float]:
    """The least that the layout needs: weights gathered once a layer and pass, gradients scattered once, heads exchanged for positions."""
    item, fsdp, context, tensor = jnp.dtype(model.dtype).itemsize, sizes['fsdp'], sizes['context'], sizes['tensor']
    weights = model.num_params / tensor * item
    again = model.remat != 'none'  # what is kept of attention lies with its heads, and goes to its positions once more
    kv = model.num_kv_heads
    while kv % (tensor * context) and kv < model.num_heads:
        kv *= 2
    exchanged = positions * item * model.num_layers * model.head_dim * 2 * (model.num_heads + kv) / tensor * (2 + again)
    reduced = positions * item * model.num_layers * model.embed_dim * 2 * (2 + again) if tensor > 1 else 0
    groups = [('all-gather', 2 * weights, fsdp, 1), ('reduce-scatter', weights, fsdp, 1), ('all-to-all', exchanged, context, 1),
              ('all-reduce', weights / fsdp, context * sizes['data'], 2), ('all-reduce', reduced, tensor, 2)]
    sent: dict[str, float] = {}
    seconds = 0.0
    for kind, size, group, passes in groups:
        amount = size * passes * (group - 1) / group
        if amount:
            sent[kind] = sent.get(kind, 0.0) + amount
            seconds += amount / (slice.chip.link_bandwidth * slice.share(group))
    return sent, seconds


def update(model: ModelConfig, sizes: dict[str, int]) -> Work:
    """AdamW: reads parameters, moments and gradients, twice for the norm, and writes the first three."""
    shard = model.num_params / (sizes['fsdp'] * sizes['tensor'])
    return Work(0.0, 20 * shard, 32 * shard, {}, 0.0)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Sampling on one engine.

    Attributes:
      rows: answers decoded at a time on each data shard.
      seconds: of one decode step, by the bytes that it must read.
      rate: tokens a second of the engine.
    """

    rows: float
    seconds: float
    rate: float


def decoding(model: ModelConfig, slice: Slice, shards: int, tensor: int, rows: float, context: float) -> Decoding:
    """Decoding `rows` rows on each shard whose contexts are `context` positions long on average: bound by HBM or by products."""
    item = jnp.dtype(model.dtype).itemsize
    read = model.num_params * item / tensor + rows * context * kv_bytes(model, tensor)
    flops = rows * (2 * model.num_params + 4 * model.num_layers * model.num_heads * model.head_dim * context) / tensor
    seconds = max(read / slice.chip.hbm_bandwidth, flops / slice.chip.flops)
    return Decoding(rows, seconds, rows * shards / seconds if rows else 0.0)
