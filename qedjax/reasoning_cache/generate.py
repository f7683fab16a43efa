"""Chains of turns for a JSONL file of problems: what launch/generate.py runs with --turns."""

import asyncio
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from qedjax.checkpoint.load import is_hf_folder, load_model, load_tokenizer, read_generation_config
from qedjax.checkpoint.manager import find_checkpoint
from qedjax.data.chat import num_valid_ids, stop_ids
from qedjax.llm.local import LocalEndpoint
from qedjax.metrics import Progress
from qedjax.model.config import ModelConfig
from qedjax.reasoning_cache.decoder import Decoder, RCConfig, Writer, decode, longest_requests, validate
from qedjax.reasoning_cache.journal import Journal
from qedjax.reasoning_cache.state import State, Trace, to_json
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig, limits_of
from qedjax.rollout.generate import fitted, read_input, sampler_config, whole_file
from qedjax.rollout.requests import check_request
from qedjax.sharding import rollout_mesh_of_all


def generate_traces(checkpoint: str, input_path: str, output_path: str, cfg: RCConfig, *, n: int = 1, seed: int = 0,
                    engine_config: EngineConfig | None = None, dtype: str = 'bfloat16', tensor: int = 1) -> None:
    """Decodes n chains for each row (`prompt`, text) of a JSONL file and writes the rows, with `traces` added, to another.

    A trace has the answer, the turn that gave it (from 0; null for none), why the chain ended, and all states and calls. Calls are kept
    in OUTPUT.calls until the output is whole: started again, the command goes on after the last of them. Sizes and devices are as in
    rollout.generate. Raises ValueError for what cannot be served, before weights are read; OSError for what cannot be written.
    """
    validate(cfg)
    rows = read_input(input_path, 'traces')
    if n < 1 or seed < 0:
        raise ValueError(f'n={n} must be at least 1 and seed={seed} not negative')
    model_config, tokenizer, mesh = sampler_config(checkpoint, dtype), load_tokenizer(checkpoint), rollout_mesh_of_all(tensor)
    stops, num_valid = stop_ids(tokenizer, read_generation_config(checkpoint)), num_valid_ids(tokenizer)
    requests = [_longest(i, row, cfg, tokenizer, stops) for i, row in enumerate(rows, 1)]
    config = _checked(engine_config or EngineConfig(), model_config, mesh, num_valid, requests)
    weights = checkpoint if is_hf_folder(checkpoint) else find_checkpoint(checkpoint)
    identity = {'chains': dataclasses.asdict(cfg), 'n': n, 'seed': seed, 'dtype': dtype, 'problems': [row['prompt'] for row in rows],
                'weights': str(pathlib.Path(weights).absolute())}
    output = pathlib.Path(output_path)
    calls = output.with_name(f'{output.name}.calls')
    with whole_file(output) as file, Journal(calls, identity) as journal:
        engine = Engine(load_model(checkpoint, mesh, model_config), mesh, config, num_valid, tokenizer, donate=True)
        traces = asyncio.run(_decode(engine, stops, cfg, [row['prompt'] for row in rows for _ in range(n)], n, seed, journal))
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {'traces': list(map(_describe, traces[i * n : (i + 1) * n]))}, ensure_ascii=False) + '\n')
    calls.unlink()
    _warn(traces)


def _warn(traces: Sequence[Trace]) -> None:
    """Says what a reader of the output might not see."""
    if failed := [trace.end for trace in traces if trace.end.startswith('failed')]:
        logging.warning('%d of %d chains failed, e.g. %s', len(failed), len(traces), failed[0])
    kept = [after.summary is before.summary for trace in traces for before, after in itertools.pairwise(trace.states)]
    if any(kept):
        logging.warning('%d of %d summaries were empty, so the turns after them know no more than those before; --summary_tokens bounds '
                        'the thinking before a summary too: raise it, or turn thinking off', sum(kept), len(kept))


def _longest(number: int, row: dict[str, Any], cfg: RCConfig, tokenizer: Any, stops: tuple[int, ...]) -> list[Any]:
    if not isinstance(row.get('prompt'), str) or not row['prompt'].strip():
        raise ValueError(f'input row {number} needs `prompt`, the text of a problem: chains write their own messages')
    return longest_requests(cfg, row['prompt'], tokenizer, stops)


def _checked(config: EngineConfig, model_config: ModelConfig, mesh: Mesh, num_valid: int, requests: list[Any]) -> EngineConfig:
    """The engine's sizes for the longest requests of all rows, which it can serve."""
    longest = max(len(prompt) + params.max_tokens for row in requests for prompt, params in row)
    config = fitted(config, model_config, mesh, longest)
    limits = limits_of(config, model_config, num_valid, mesh.shape['data'])
    for i, row in enumerate(requests, 1):
        for prompt, params in row:
            check_request(prompt, params, limits, f'the longest prompt of a chain of input row {i}')
    return config


async def _decode(engine: Engine, stops: tuple[int, ...], cfg: RCConfig, problems: Sequence[str], n: int, seed: int,
                  journal: Journal) -> list[Trace]:
    progress = Progress('generate', len(problems) * (2 * cfg.turns - 1))

    def committed(key: int, trace: Trace) -> None:
        journal.committed(key, trace)
        progress.update(journal.count, len(trace.calls[-1].completion.ids))

    async with LocalEndpoint(engine, stops) as endpoint:
        writer = Writer(endpoint, engine.tokenizer, stops)
        decoder = Decoder(cfg, writer, writer, committed=committed)
        seeds = [np.random.SeedSequence((seed, *divmod(i, n))).generate_state(1)[0] for i in range(len(problems))]
        chains = [(i, journal.resumed(decoder, i, State(problem)), int(seeds[i])) for i, problem in enumerate(problems)]
        return await decode(decoder, chains)


def _describe(trace: Trace) -> dict[str, Any]:
    answer, turn = trace.answer
    return {'answer': answer, 'turn': turn, 'tokens': trace.tokens, **to_json(trace)}
