"""Completions for a JSONL file of prompts: what launch/generate.py runs."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from qedjax.checkpoint.load import load_model, load_tokenizer, read_generation_config, resolve_config
from qedjax.data.chat import OPEN, num_valid_ids, prompt_ids, split_thinking, stop_ids
from qedjax.metrics import Progress
from qedjax.model.config import ModelConfig
from qedjax.rollout.decode import generate
from qedjax.sharding import MeshConfig, make_mesh
from qedjax.types import Completion, SamplingParams


def generate_file(checkpoint: str, input_path: str, output_path: str, params: SamplingParams, *, n: int = 1, batch: int = 16,
                  thinking: bool | None = None, dtype: str = 'bfloat16', mesh_config: MeshConfig | None = None) -> None:
    """Samples n completions for each row of a JSONL file and writes the rows, with `completions` added, to another.

    Rows hold `prompt` (text) or `messages`. Sample i of a row is drawn with sample index row * n + i, so all differ under one seed.
    Raises ValueError for a missing or wrong file, row or checkpoint, before anything is compiled; the output appears when it is whole.
    """
    rows, output = _read(input_path), pathlib.Path(output_path)
    if output.exists():
        raise ValueError(f'{output} already exists; delete it or name another --output')
    if n < 1:
        raise ValueError(f'n must be at least 1, not {n}')
    cfg = resolve_config(checkpoint, ModelConfig(param_dtype=dtype, dtype=dtype, remat='none'))
    tokenizer = load_tokenizer(checkpoint)
    num_valid = num_valid_ids(tokenizer)
    prompts = [_encode(i, row, tokenizer, thinking) for i, row in enumerate(rows, 1) for _ in range(n)]
    params = dataclasses.replace(params, stop_ids=stop_ids(tokenizer, read_generation_config(checkpoint)))
    mesh = make_mesh(mesh_config or MeshConfig())
    model = load_model(checkpoint, mesh, cfg)
    progress = Progress('generate', len(prompts))
    with jax.set_mesh(mesh):
        results = generate(model, prompts, [params] * len(prompts), num_valid=num_valid, batch=batch, samples=range(len(prompts)),
                           progress=progress.update)
    completions = [_describe(tokenizer, prompt, result) for prompt, result in zip(prompts, results, strict=True)]
    partial = output.with_name(f'.{output.name}.partial')
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open('w') as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {'completions': completions[i * n : (i + 1) * n]}, ensure_ascii=False) + '\n')
    partial.rename(output)


def decode(tokenizer, result: tuple[tuple[int, ...], tuple[float, ...], str]) -> Completion:
    """A sampler's result with its text; the stop token has no text."""
    ids, logprobs, reason = result
    return Completion(tokenizer.decode(ids[:-1] if reason == 'stop' else ids), ids, logprobs, reason)


def _read(path: str) -> list[dict[str, Any]]:
    if not pathlib.Path(path).is_file():
        raise ValueError(f'{path} does not exist; --input names a JSONL file with prompt or messages in each row')
    rows = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path}:{number} is not JSON ({error.msg})') from error
        if not isinstance(row, dict) or not (isinstance(row.get('prompt'), str) or isinstance(row.get('messages'), list)):
            raise ValueError(f'{path}:{number} needs `prompt` (text) or `messages` (list)')
        rows.append(row)
    if not rows:
        raise ValueError(f'{path} holds no rows')
    return rows


def _encode(number: int, row: dict[str, Any], tokenizer, thinking: bool | None) -> tuple[int, ...]:
    try:
        if tokenizer.chat_template is None and 'messages' not in row:
            return tuple(tokenizer.encode(row['prompt']))
        return prompt_ids(tokenizer, row.get('messages') or [{'role': 'user', 'content': row['prompt']}], thinking)
    except ValueError as error:
        raise ValueError(f'input row {number}: {error}') from error


def _describe(tokenizer, prompt: tuple[int, ...], result) -> dict[str, Any]:
    completion = decode(tokenizer, result)
    opened = tokenizer.decode(prompt[-8:]).rstrip().endswith(OPEN)
    thought = split_thinking(completion.text, opened)
    return {'text': completion.text, 'reasoning': thought.reasoning, 'answer': thought.answer, 'finish_reason': completion.finish_reason,
            'ids': completion.ids, 'logprobs': completion.logprobs}
