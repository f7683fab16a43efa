"""Completions for a JSONL file of prompts: what launch/generate.py runs."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from qedjax.checkpoint.load import load_model, load_tokenizer, read_generation_config, resolve_config
from qedjax.data.chat import num_valid_ids, prompt_ids, stop_ids, thought_of
from qedjax.metrics import Progress
from qedjax.model.config import ModelConfig
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig, limits_of, validate
from qedjax.rollout.requests import check_request
from qedjax.sharding import rollout_mesh_of_all
from qedjax.types import Completion, SamplingParams


def generate_file(checkpoint: str, input_path: str, output_path: str, params: SamplingParams, *, n: int = 1,
                  engine_config: EngineConfig | None = None, thinking: bool | None = None, dtype: str = 'bfloat16',
                  tensor: int = 1) -> None:
    """Samples n completions for each row of a JSONL file and writes the rows, with `completions` added, to another.

    Rows hold `prompt` (text) or `messages`. Sample i of a row is drawn with sample index row * n + i, so all differ under one seed. An
    engine_config without max_length gets the longest that a row may need. `tensor` devices share the heads, the others the requests.
    Raises ValueError for a missing or wrong file, row, size or checkpoint, and OSError for an output that cannot be written, before
    weights are read and anything is compiled; the output appears when it is whole.
    """
    rows = read_input(input_path, 'completions')
    if n < 1:
        raise ValueError(f'n must be at least 1, not {n}')
    cfg = sampler_config(checkpoint, dtype)
    tokenizer = load_tokenizer(checkpoint)
    num_valid = num_valid_ids(tokenizer)
    prompts = [_encode(i, row, tokenizer, thinking) for i, row in enumerate(rows, 1)]
    params = dataclasses.replace(params, stop_ids=stop_ids(tokenizer, read_generation_config(checkpoint)))
    mesh = rollout_mesh_of_all(tensor)
    longest = max(map(len, prompts)) + (params.max_tokens or cfg.max_positions)
    config = fitted(engine_config or EngineConfig(), cfg, mesh, longest)
    limits = limits_of(config, cfg, num_valid, mesh.shape['data'])
    for i, prompt in enumerate(prompts, 1):
        check_request(prompt, params, limits, f'the prompt of input row {i}')
    with whole_file(pathlib.Path(output_path)) as file:
        engine = Engine(load_model(checkpoint, mesh, cfg), mesh, config, num_valid, tokenizer, donate=True)
        progress = Progress('generate', len(prompts) * n)
        requests = [prompt for prompt in prompts for _ in range(n)]
        samples = [dataclasses.replace(params, sample=i) for i in range(len(requests))]
        completions = [_describe(tokenizer, c) for c in engine.generate(requests, samples, progress.update)]
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {'completions': completions[i * n : (i + 1) * n]}, ensure_ascii=False) + '\n')


def sampler_config(checkpoint: str, dtype: str) -> ModelConfig:
    """Config of a checkpoint's model for sampling."""
    kernel = 'ragged' if jax.default_backend() == 'tpu' else 'xla'
    return resolve_config(checkpoint, ModelConfig(param_dtype=dtype, dtype=dtype, remat='none', paged_attention=kernel))


def fitted(config: EngineConfig, cfg: ModelConfig, mesh: Mesh, longest: int) -> EngineConfig:
    """The engine's sizes: whole rows for every shard, and without a max_length one for `longest` positions, if the model has them."""
    shards = mesh.shape['data']
    config = dataclasses.replace(config, slots=-(-config.slots // shards) * shards, staged=-(-config.staged // shards) * shards,
                                 max_length=config.max_length or min(longest, cfg.max_positions))
    validate(config, shards, cfg)
    return config


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[TextIO]:
    """A file under another name that gets its own at the end; opened at once, so that a path that cannot be written costs no sampling."""
    if path.exists():
        raise ValueError(f'{path} already exists; delete it or name another --output')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    with partial.open('a', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f'another command is writing {path}; wait for it, or name another --output') from error
        file.truncate(0)  # what a killed command left
        try:
            yield file
            file.flush()
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def read_input(path: str, added: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file of prompts, none of which has the column that is to be added. Raises ValueError for what is wrong, and where."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f'{path} does not exist; --input names a JSONL file with prompt or messages in each row')
    # Not splitlines(): it would also cut at characters such as U+2028, which JSON strings may hold.
    lines = enumerate(pathlib.Path(path).read_bytes().split(b'\n'), 1)
    rows = [_parse(line, f'{path}:{number}', added) for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f'{path} holds no rows')
    return rows


def _parse(line: bytes, where: str, added: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair could not be written back
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is not JSON in UTF-8 ({error})') from error
    if not isinstance(row, dict) or not (isinstance(row.get('prompt'), str) or isinstance(row.get('messages'), list)):
        raise ValueError(f'{where} needs `prompt` (text) or `messages` (list)')
    if added in row:
        raise ValueError(f'{where} has `{added}` already, which would be lost; rename that column')
    return row


def _encode(number: int, row: dict[str, Any], tokenizer, thinking: bool | None) -> tuple[int, ...]:
    try:
        messages = row.get('messages')
        if tokenizer.chat_template is None and messages is None:
            return tuple(tokenizer.encode(row['prompt'], verbose=False))
        return prompt_ids(tokenizer, [{'role': 'user', 'content': row['prompt']}] if messages is None else messages, thinking)
    except ValueError as error:
        raise ValueError(f'input row {number}: {error}') from error


def _describe(tokenizer, completion: Completion) -> dict[str, Any]:
    thought = thought_of(tokenizer, completion)
    return {'text': completion.text, 'reasoning': thought.reasoning, 'answer': thought.answer, 'finish_reason': completion.finish_reason,
            'ids': completion.ids, 'logprobs': completion.logprobs}
