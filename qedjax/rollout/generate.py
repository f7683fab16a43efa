"""Completions for a JSONL file of prompts: what launch/generate.py runs."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from qedjax.checkpoint.load import load_model, load_tokenizer, read_generation_config, resolve_config
from qedjax.data.chat import OPEN, num_valid_ids, prompt_ids, split_thinking, stop_ids
from qedjax.metrics import Progress
from qedjax.model.config import ModelConfig
from qedjax.rollout.static import check, generate
from qedjax.sharding import MeshConfig, make_mesh
from qedjax.types import Completion, SamplingParams


def generate_file(checkpoint: str, input_path: str, output_path: str, params: SamplingParams, *, n: int = 1, batch: int = 16,
                  thinking: bool | None = None, dtype: str = 'bfloat16', mesh_config: MeshConfig | None = None) -> None:
    """Samples n completions for each row of a JSONL file and writes the rows, with `completions` added, to another.

    Rows hold `prompt` (text) or `messages`. Sample i of a row is drawn with sample index row * n + i, so all differ under one seed.
    Raises ValueError for a missing or wrong file, row or checkpoint, and OSError for an output that cannot be written, before weights are
    read and anything is compiled; the output appears when it is whole.
    """
    rows = _read(input_path)
    if n < 1:
        raise ValueError(f'n must be at least 1, not {n}')
    cfg = resolve_config(checkpoint, ModelConfig(param_dtype=dtype, dtype=dtype, remat='none'))
    tokenizer = load_tokenizer(checkpoint)
    num_valid = num_valid_ids(tokenizer)
    prompts = [_encode(i, row, tokenizer, thinking) for i, row in enumerate(rows, 1)]
    params = dataclasses.replace(params, stop_ids=stop_ids(tokenizer, read_generation_config(checkpoint)))
    check(cfg, prompts, [params] * len(prompts), num_valid, batch)
    mesh = make_mesh(mesh_config or MeshConfig())
    prompts = [prompt for prompt in prompts for _ in range(n)]
    with _whole(pathlib.Path(output_path)) as file:
        model = load_model(checkpoint, mesh, cfg)
        progress = Progress('generate', len(prompts))
        with jax.set_mesh(mesh):
            results = generate(model, prompts, [params] * len(prompts), num_valid=num_valid, batch=batch, samples=range(len(prompts)),
                               progress=progress.update)
        completions = [_describe(tokenizer, prompt, result) for prompt, result in zip(prompts, results, strict=True)]
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {'completions': completions[i * n : (i + 1) * n]}, ensure_ascii=False) + '\n')


def decode(tokenizer, result: tuple[tuple[int, ...], tuple[float, ...], str]) -> Completion:
    """A sampler's result with its text; the stop token has no text."""
    ids, logprobs, reason = result
    text = tokenizer.decode(ids[:-1] if reason == 'stop' else ids, clean_up_tokenization_spaces=False)
    return Completion(text, ids, logprobs, reason)


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[TextIO]:
    """A file under another name that gets its own at the end; opened at once, so that a path that cannot be written costs no sampling."""
    if path.exists():
        raise ValueError(f'{path} already exists; delete it or name another --output')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with partial.open('w', encoding='utf-8') as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: str) -> list[dict[str, Any]]:
    if not pathlib.Path(path).is_file():
        raise ValueError(f'{path} does not exist; --input names a JSONL file with prompt or messages in each row')
    # Not splitlines(): it would also cut at characters such as U+2028, which JSON strings may hold.
    lines = enumerate(pathlib.Path(path).read_bytes().split(b'\n'), 1)
    rows = [_parse(line, f'{path}:{number}') for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f'{path} holds no rows')
    return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair could not be written back
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is not JSON in UTF-8 ({error})') from error
    if not isinstance(row, dict) or not (isinstance(row.get('prompt'), str) or isinstance(row.get('messages'), list)):
        raise ValueError(f'{where} needs `prompt` (text) or `messages` (list)')
    if 'completions' in row:
        raise ValueError(f'{where} has `completions` already, which would be lost; rename that column')
    return row


def _encode(number: int, row: dict[str, Any], tokenizer, thinking: bool | None) -> tuple[int, ...]:
    try:
        messages = row.get('messages')
        if tokenizer.chat_template is None and messages is None:
            return tuple(tokenizer.encode(row['prompt'], verbose=False))
        return prompt_ids(tokenizer, [{'role': 'user', 'content': row['prompt']}] if messages is None else messages, thinking)
    except ValueError as error:
        raise ValueError(f'input row {number}: {error}') from error


def _describe(tokenizer, prompt: tuple[int, ...], result) -> dict[str, Any]:
    completion = decode(tokenizer, result)
    opened = tokenizer.decode(prompt[-8:]).rstrip().endswith(OPEN)
    thought = split_thinking(completion.text, opened)
    return {'text': completion.text, 'reasoning': thought.reasoning, 'answer': thought.answer, 'finish_reason': completion.finish_reason,
            'ids': completion.ids, 'logprobs': completion.logprobs}
