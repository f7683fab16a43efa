"""The reasoning cache with every chain in flight, beside the same work turn by turn: no chain begins a call before all have ended theirs.

python tools/bench_rc.py [--problems=64 --chains=4 --turns=8 --slots=32,64,128]

A small random model writes one letter over and over; how often is log-normal (sigma 1) and decided by the seed of the call, so both ways
make the very same calls, which is checked. Warm-up is not timed. Utilisation is the share of slots that drew an id, over all decode steps
of the run; what it lacks is the end of the run, where the last chains finish alone. Steps do not depend on what else the machine does;
seconds do, and they hold the prefill of what was written, the same both ways, which on a CPU costs about as much a token as decoding.
"""

import asyncio
import dataclasses
import time

import jax
import numpy as np
from absl import flags

from qedjax import cli
from qedjax.llm.client import LanguageModel, Prompt
from qedjax.llm.local import LocalEndpoint
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.reasoning_cache.decoder import Decoder, PhaseConfig, RCConfig, Writer, decode
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import State, Trace, begin
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig, Stats
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_tokenizer
from qedjax.types import Completion, SamplingParams

PROBLEMS = flags.DEFINE_integer('problems', 64, 'Problems.')
CHAINS = flags.DEFINE_integer('chains', 4, 'Chains a problem.')
TURNS = flags.DEFINE_integer('turns', 8, 'Turns a chain.')
SLOTS = flags.DEFINE_list('slots', ['32', '64', '128'], 'Requests decoded at a time; each number is measured.')
REASONING = flags.DEFINE_list('reasoning', ['64', '256'], 'Mean and most tokens of a reasoning.')
SUMMARY = flags.DEFINE_list('summary', ['16', '64'], 'Mean and most tokens of a summary.')
MODEL = ModelConfig(vocab_size=288, embed_dim=128, mlp_dim=384, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_positions=1024,
                    dtype='float32', remat='none')


class LongTailed:
    """A model that writes as much as a log-normal draw from its seed says. With a barrier, it begins no call until all chains have come."""

    def __init__(self, model: LanguageModel, letter: int, barrier: asyncio.Barrier | None):
        self._model, self._letter, self._barrier = model, letter, barrier

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """See LanguageModel."""
        if self._barrier:
            await self._barrier.wait()
        mean, most = map(int, REASONING.value if params.max_tokens == int(REASONING.value[1]) else SUMMARY.value)
        length = int(np.clip(np.random.default_rng(params.seed).lognormal(np.log(mean) - 0.5, 1.0), 1, most))
        params = dataclasses.replace(params, max_tokens=length, stop_ids=(), logit_bias=((self._letter, 1e9),))
        return await self._model.complete(prompt, params)


def measure(engine: Engine, together: bool) -> tuple[list[Trace], dict[str, float]]:
    """The chains of all problems, with or without a barrier, and what they took."""
    cfg = RCConfig(TURNS.value, PhaseConfig(int(REASONING.value[1])), PhaseConfig(int(SUMMARY.value[1])), prompts=RENDERINGS['derivations'])
    count = PROBLEMS.value * CHAINS.value
    engine.stats = Stats()

    async def main() -> list[Trace]:
        async with LocalEndpoint(engine) as endpoint:
            model = LongTailed(endpoint, engine.tokenizer.encode('S')[0], asyncio.Barrier(count) if together else None)
            writer = Writer(model, engine.tokenizer)  # type: ignore[arg-type]
            starts = [begin(State(f'problem {i // CHAINS.value}')) for i in range(count)]
            return await decode(Decoder(cfg, writer, writer), [(i, start, i) for i, start in enumerate(starts)])

    start = time.perf_counter()
    traces = asyncio.run(main())
    seconds, stats = time.perf_counter() - start, engine.stats
    steps = stats.slot_steps / engine.config.slots
    return traces, {'utilisation': stats.row_steps / stats.slot_steps, 'steps': steps, 'drawn': stats.tokens,
                    'prefilled': stats.prefill_tokens, 'seconds': seconds}


def main(_) -> None:
    model = create(lambda: Transformer(MODEL, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {MODEL.num_params / 1e6:.1f} M parameters; {PROBLEMS.value} problems x '
          f'{CHAINS.value} chains x {TURNS.value} turns; mean:most tokens {":".join(REASONING.value)} and {":".join(SUMMARY.value)}')
    print(f'{"slots":>6}{"":>10}' + ''.join(f'{name:>13}' for name in ('utilisation', 'steps', 'drawn', 'prefilled', 'seconds')))
    for slots in map(int, SLOTS.value):
        config = EngineConfig(slots=slots, staged=slots, max_length=int(REASONING.value[1]) + 2 * int(SUMMARY.value[1]) + 64, steps=4)
        engine = Engine(model, make_rollout_mesh(), config, 270, tiny_tokenizer('none'))
        (free, ours), (barred, theirs) = measure(engine, False), measure(engine, True)
        assert [[call.completion.ids for call in t.calls] for t in free] == [[call.completion.ids for call in t.calls] for t in barred]
        for name, row in (('in flight', ours), ('barrier', theirs)):
            print(f'{slots:>6}{name:>10}{row["utilisation"]:>13.1%}' + ''.join(f'{row[key]:>13.0f}' for key in list(row)[1:]))
        print(f'{"":>16}barrier / in flight: {theirs["steps"] / ours["steps"]:.2f} in steps, {theirs["seconds"] / ours["seconds"]:.2f} in '
              'seconds', flush=True)


if __name__ == '__main__':
    cli.run(main)
