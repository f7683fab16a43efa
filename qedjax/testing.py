"""Tiny models and tokenizers, and a scripted judge behind HTTP, for tests of this project and of its forks."""

import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import transformers

from qedjax.model.config import ModelConfig
from qedjax.types import TrainBatch

# (family, tied, head_dim apart from D / N): one config of each kind that conversion and parity must handle.
_TINY = ModelConfig(vocab_size=320, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, rope_theta=1e6,
                    max_positions=4096, dtype='float32', attention_block=16, remat='none')


def tiny_config(family: str = 'qwen3', **changes) -> ModelConfig:
    """A model of about 40k parameters; head_dim is not D / N, and V exceeds the tokenizer's ids. `changes` replace fields."""
    kinds = {'qwen3': {}, 'qwen2': {'qk_norm': False, 'qkv_bias': True}, 'llama': {'qk_norm': False, 'tie_embeddings': False}}
    return dataclasses.replace(_TINY, family=family, **(kinds[family] | changes))


def random_batch(seed: int, rows: int, length: int, vocab: int = 300) -> TrainBatch:
    """Packed rows of random ids: documents of random lengths, a padding tail, about half of the targets trained. Host arrays."""
    rng = np.random.default_rng(seed)
    tokens, weights = rng.integers(0, vocab, (rows, length)), rng.random((rows, length)) < 0.5
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < length - length // 8:
            size = int(rng.integers(1, length // 2 + 1))
            segments[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(min(size, length - start))
            start, segment = start + size, segment + 1
    following = np.roll(segments, -1, axis=1)
    following[:, -1] = 0
    targets = np.where(following == segments, np.roll(tokens, -1, axis=1), 0)
    weights = weights & (segments > 0) & (following == segments)
    fields: Any = tokens.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32), positions, segments
    return TrainBatch(*fields)


def shared_data() -> pathlib.Path:
    """Folder of real problems, proofs and tokenizers (QEDJAX_SHARED, or ../shared beside the repository); skips the test if absent."""
    import pytest

    folder = pathlib.Path(os.environ.get('QEDJAX_SHARED', pathlib.Path(__file__).parents[2] / 'shared')) / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}')
    return folder


_SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
_MARKUP = ('<think>', '</think>', '<tool_response>', '</tool_response>')
_MERGES = (('\n', '\n'), ('t', 'h'), ('th', 'e'), (' ', 'the'), ('i', 'n'), ('.', '.'), ('.', '\n'))

_PLAIN_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role + '\n' + message.content }}<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{{ 'assistant\n' }}{%- endif -%}
"""

# Qwen3's behaviour: reasoning is written only after the last real query, so history loses its think blocks.
_THINKING_TEMPLATE = """
{%- set query = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- set tool = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') -%}
  {%- if message.role == 'user' and not tool -%}{%- set query.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- set content, thought = message.content, message.reasoning_content -%}
  {%- if message.role == 'assistant' and thought is not string -%}
    {%- set thought = '' -%}
    {%- if '</think>' in content -%}
      {%- set before = content.split('</think>')[0] -%}
      {%- set thought = before.split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
  {%- endif -%}
  {%- if message.role == 'assistant' and loop.index0 > query.last and (thought or loop.last) -%}
    {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
  {%- else -%}
    {{- content -}}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{% GENERATION %}{%- endif -%}
"""
_GENERATION = {
    'hybrid': "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    'open': "{{ '<think>\n' }}",
}


def tiny_tokenizer(thinking: str = 'hybrid') -> transformers.PreTrainedTokenizerFast:
    """Bytes, a few merges and Qwen3's control tokens: 270 ids, which fit `tiny_config`. Turns end with <|im_end|>.

    `thinking` picks the chat template: 'hybrid' (enable_thinking=False puts an empty think block into the prompt),
    'open' (the prompt ends inside <think>) or 'none' (plain ChatML, reasoning ignored).
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = [(byte_level.pre_tokenize_str(left)[0][0], byte_level.pre_tokenize_str(right)[0][0]) for left, right in _MERGES]
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(symbols, range(len(symbols)), strict=True)), merges))
    backend.pre_tokenizer, backend.decoder = byte_level, tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in _SPECIAL])
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in _MARKUP])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token='<|im_end|>', pad_token='<|endoftext|>', clean_up_tokenization_spaces=False,
        model_max_length=4096)
    if thinking == 'none':
        tokenizer.chat_template = _PLAIN_TEMPLATE.strip()
    else:
        tokenizer.chat_template = _THINKING_TEMPLATE.strip().replace('{% GENERATION %}', _GENERATION[thinking])
    return tokenizer


def write_sums(folder: str | os.PathLike, rows: int = 90) -> None:
    """Data for configs/tiny_sft.py: a tokenizer, and sums of two digits with their reasoning, a tenth of them held out."""
    folder = pathlib.Path(folder)
    tiny_tokenizer().save_pretrained(folder / 'tokenizer')
    pairs = np.random.default_rng(0).permutation(100)[:rows]
    lines = [json.dumps({'prompt': f'{p // 10}+{p % 10}', 'reasoning': f'{p // 10} and {p % 10}', 'completion': str(p // 10 + p % 10)})
             for p in pairs.tolist()]
    for name, part in (('held_out', lines[: rows // 10]), ('train', lines[rows // 10 :])):
        (folder / f'{name}.jsonl').write_text('\n'.join(part) + '\n')


class ScriptedServer(contextlib.AbstractContextManager):
    """A real HTTP server with OpenAI's chat and responses APIs, whose every reply a function decides: judges that misbehave, on purpose.

    Args:
      reply: gets the number of the call (from 0) and the request's body, and returns a text to be sent as the model's, a dict to be sent
        as the whole body, bytes to be sent as they are, or a (status, headers, body) triple; a float is slept for first, as (float, reply).
      port: to listen on; 0 is any that is free.

    Attributes:
      base_url: of the API. calls: bodies of all requests, in order.
    """

    def __init__(self, reply: Callable[[int, dict[str, Any]], Any], port: int = 0):
        self.calls: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['content-length'])))
                with server._lock:
                    server.calls.append(body)
                    number = len(server.calls) - 1
                server._answer(self, reply(number, body), responses=self.path.endswith('/responses'))

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_):
                pass  # clients that give up are what these tests are about

        self._server = Server(('127.0.0.1', port), Handler)
        self.base_url = f'http://127.0.0.1:{self._server.server_port}/v1'
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True)
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler, said: Any, responses: bool) -> None:
        if isinstance(said, tuple) and isinstance(said[0], float):
            time.sleep(said[0])
            said = said[1]
        status, headers, body = said if isinstance(said, tuple) else (200, {}, said)
        if isinstance(body, str) and status == 200:
            body = model_reply(body, responses)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in ({'content-type': 'application/json', 'content-length': str(len(content))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


def model_reply(text: str, responses: bool = False, finish: str = 'stop') -> dict[str, Any]:
    """The body of a successful reply of either API."""
    if responses:
        return {'id': 'r', 'object': 'response', 'status': 'completed', 'usage': {'input_tokens': 10, 'output_tokens': 5},
                'output': [{'type': 'reasoning', 'summary': []},
                           {'type': 'message', 'role': 'assistant', 'content': [{'type': 'output_text', 'text': text}]}]}
    return {'id': 'c', 'object': 'chat.completion', 'usage': {'prompt_tokens': 10, 'completion_tokens': 5},
            'choices': [{'index': 0, 'finish_reason': finish, 'message': {'role': 'assistant', 'content': text}}]}
