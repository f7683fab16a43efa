"""The SFT step measured: tokens/s beside transformers + torch, compile time by depth, memory with and without the chunked head.

python tools/bench_train.py [--part=speed|compile|memory|all]

speed: the same 8M-parameter Qwen3, float32, AdamW, same batches, same CPU; the two take turns (needs the `parity` extra). compile: seconds
for 4 and for 36 layers. memory: compiled.memory_analysis() of the 2-layer step at 49,152 positions and 151,936 ids; nothing is run.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from qedjax import cli
from qedjax.model.config import ModelConfig
from qedjax.model.presets import qwen3_4b_2507
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, abstract, create, make_mesh
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import OptimizerConfig, make_optimizer
from qedjax.train.step import init_state, make_train_step, place_batch
from qedjax.types import TrainBatch

PART = flags.DEFINE_enum('part', 'all', ['speed', 'compile', 'memory', 'all'], 'What to measure.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side; the median counts.')
SMALL = ModelConfig(vocab_size=8192, embed_dim=256, mlp_dim=768, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, dtype='float32',
                    remat='full', attention_block=128, max_positions=4096)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule='constant', warmup_fraction=0.0, weight_decay=0.01, clip_norm=1.0)


def make_batch(rows: int, length: int, vocab: int) -> TrainBatch:
    """One document a row, every token trained: what torch is given too."""
    ids = np.random.default_rng(0).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return TrainBatch(ids[:, :-1], ids[:, 1:], np.ones((rows, length), np.float32), positions, np.ones((rows, length), np.int32))


def ours(batch: TrainBatch, mesh):
    """A function that runs one step of ours to its end."""
    tx = make_optimizer(OPTIMIZER, 1000)
    state = create(lambda: init_state(Transformer(SMALL, jax.random.key(0)), tx), mesh)
    step, placed = make_train_step(next_token_loss, tx, OPTIMIZER.clip_norm, 0), place_batch(batch, mesh, 1)

    def run():
        nonlocal state
        state, metrics = step(state, placed)
        return float(metrics['loss'])

    return run


def theirs(batch: TrainBatch):
    """The same step in torch: transformers' model with its fastest CPU attention, torch's AdamW."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=SMALL.vocab_size, hidden_size=SMALL.embed_dim, intermediate_size=SMALL.mlp_dim, num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads, num_key_value_heads=SMALL.num_kv_heads, head_dim=SMALL.head_dim, tie_word_embeddings=True,
        attn_implementation='sdpa', use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
    tokens, targets = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (batch.tokens, batch.targets))

    def run():
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return float(loss)

    return run


def speed(mesh) -> None:
    print(f'{SMALL.num_params:,} parameters, float32\n{"rows x length":>14}{"ours tokens/s":>16}{"torch tokens/s":>16}{"ratio":>8}')
    for rows, length in ((8, 256), (4, 1024), (1, 4096)):
        batch = make_batch(rows, length, SMALL.vocab_size)
        runs = {'ours': ours(batch, mesh), 'torch': theirs(batch)}
        times = {name: [] for name in runs}
        for turn in range(ROUNDS.value + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn:  # the first turn compiles and warms up
                    times[name].append(time.perf_counter() - start)
        rate = {name: rows * length / np.median(seconds) for name, seconds in times.items()}
        shape, ratio = f'{rows} x {length}', rate['ours'] / rate['torch']
        print(f'{shape:>14}{rate["ours"]:>16,.0f}{rate["torch"]:>16,.0f}{ratio:>8.2f}', flush=True)


def lower(cfg: ModelConfig, rows: int, length: int, mesh, loss_fn=next_token_loss):
    """The step lowered from shapes alone."""
    tx = make_optimizer(OPTIMIZER, 1000)
    state = abstract(lambda: init_state(Transformer(cfg, jax.random.key(0)), tx), mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), make_batch(rows, length, 2))
    return make_train_step(loss_fn, tx, OPTIMIZER.clip_norm, 0).lower(state, batch)


def compile_time(mesh) -> None:
    print(f'{"layers":>8}{"lower s":>10}{"compile s":>12}{"StableHLO lines":>18}')
    for layers in (4, 36):
        start = time.perf_counter()
        lowered = lower(dataclasses.replace(SMALL, num_layers=layers, remat='full'), 4, 1024, mesh)
        middle = time.perf_counter()
        lowered.compile()
        seconds, lines = time.perf_counter() - middle, len(lowered.as_text().splitlines())
        print(f'{layers:>8}{middle - start:>10.1f}{seconds:>12.1f}{lines:>18,}', flush=True)


def unchunked_loss(model: Transformer, batch: TrainBatch):
    """The same loss with the logits in full."""
    logits = model.logits(model(batch.tokens, batch.positions, batch.segment_ids))
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == batch.targets[..., None], jax.nn.log_softmax(logits), 0.0), -1)
    return -jnp.sum(chosen * batch.weights), {}


def memory(mesh) -> None:
    cfg = dataclasses.replace(qwen3_4b_2507(), num_layers=2, remat='full')
    print(f'2 layers of Qwen3-4B, {cfg.num_params:,} parameters, 1 x 49,152 positions, {cfg.vocab_size:,} ids, bfloat16 activations')
    for name, loss_fn in (('chunked head', next_token_loss), ('logits in full', unchunked_loss)):
        stats = lower(cfg, 1, 49_152, mesh, functools.partial(loss_fn)).compile().memory_analysis()
        print(f'{name:>16}: {stats.temp_size_in_bytes / 1e9:8.2f} GB temporary, {stats.argument_size_in_bytes / 1e9:.2f} GB arguments',
              flush=True)


def main(_) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        for name, part in (('speed', speed), ('compile', compile_time), ('memory', memory)):
            if PART.value in (name, 'all'):
                print(f'== {name}')
                part(mesh)


if __name__ == '__main__':
    cli.run(main)
