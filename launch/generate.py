"""Sampling from a checkpoint: JSONL in, JSONL out.

python launch/generate.py --checkpoint=DIR --input=problems.jsonl --output=proofs.jsonl [--max_tokens=2048 --n=4 --slots=64]

Each input row has `prompt` (text) or `messages`; other columns are carried over. Each output row adds `completions`: text, reasoning,
finish_reason, token ids and log-probs. --checkpoint is a Hugging Face folder, or a workdir, checkpoint folder or step of ours.

With --turns=N each row has `prompt`, a problem, which n chains of N turns think about with the reasoning cache: --max_tokens bounds the
reasoning of a turn and --summary_tokens the summary after it. Each output row adds `traces`: answer, the turn that gave it, and every call.
An interrupted command goes on where it stopped when it is given again.
"""

import dataclasses

from absl import flags

from qedjax import cli
from qedjax.reasoning_cache.decoder import PhaseConfig, RCConfig
from qedjax.reasoning_cache.generate import generate_traces
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import MODES
from qedjax.rollout.engine_config import EngineConfig
from qedjax.rollout.generate import generate_file
from qedjax.types import SamplingParams

CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Hugging Face folder or Orbax checkpoint.', required=True)
INPUT = flags.DEFINE_string('input', None, 'JSONL file of prompts.', required=True)
OUTPUT = flags.DEFINE_string('output', None, 'JSONL file to write; it must not exist.', required=True)
TURNS = flags.DEFINE_integer('turns', 0, 'Turns of the reasoning cache; 0 samples single completions.', lower_bound=0)
SUMMARY_TOKENS = flags.DEFINE_integer('summary_tokens', 2048, 'Most tokens a summary, thinking included, with --turns.')
SUMMARIES = flags.DEFINE_enum('summaries', MODES[0], MODES, 'Whether a summary replaces the one before, with --turns.')
RENDERING = flags.DEFINE_enum('rendering', 'proof', list(RENDERINGS), 'Prompts of the chains, with --turns.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 is greedy.')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 1024, 'Most tokens a completion.')
N = flags.DEFINE_integer('n', 1, 'Completions a prompt.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the run.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Choose among the k most likely ids; 0 is off.')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Choose among the most likely ids that hold this share; 1 is off.')
MIN_P = flags.DEFINE_float('min_p', 0.0, 'Choose among ids this likely relative to the likeliest; 0 is off.')
STOP = flags.DEFINE_multi_string('stop', [], 'String that ends a completion; may be repeated.')
SLOTS = flags.DEFINE_integer('slots', 16, 'Completions decoded together.')
CACHE_TOKENS = flags.DEFINE_integer('cache_tokens', 0, 'Positions that the cache holds; 0 is enough for all slots at full length.')
THINKING = flags.DEFINE_bool('thinking', None, 'Ask the chat template for thinking on or off; unset is its default.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of weights, activations and cache.')
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that share the heads; the other devices share the completions.')


def main(_) -> None:
    params = SamplingParams(TEMPERATURE.value, MAX_TOKENS.value, SEED.value, stop=tuple(STOP.value), top_k=TOP_K.value,
                            top_p=TOP_P.value, min_p=MIN_P.value)
    paths, sizes = (CHECKPOINT.value, INPUT.value, OUTPUT.value), EngineConfig(slots=SLOTS.value, staged=SLOTS.value,
                                                                               cache_tokens=CACHE_TOKENS.value)
    if not TURNS.value:
        generate_file(*paths, params, n=N.value, thinking=THINKING.value, dtype=DTYPE.value, engine_config=sizes, tensor=TENSOR.value)
        return
    if STOP.value or MIN_P.value:
        raise ValueError('--stop and --min_p have no part in chains; leave them out with --turns')
    chains = RCConfig(TURNS.value, PhaseConfig(MAX_TOKENS.value, TEMPERATURE.value, TOP_P.value, TOP_K.value), mode=SUMMARIES.value,
                      prompts=dataclasses.replace(RENDERINGS[RENDERING.value], thinking=THINKING.value))
    chains.summarise.max_tokens = SUMMARY_TOKENS.value
    generate_traces(*paths, chains, n=N.value, seed=SEED.value, dtype=DTYPE.value, engine_config=sizes, tensor=TENSOR.value)


if __name__ == '__main__':
    cli.run(main)
