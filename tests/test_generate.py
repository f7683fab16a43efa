"""JSONL in, JSONL out: rows are carried over whole, and whatever is wrong is said before a weight is read."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from qedjax.checkpoint.load import copy_tokenizer
from qedjax.checkpoint.manager import save_tree
from qedjax.data.chat import prompt_ids
from qedjax.model.transformer import Transformer
from qedjax.rollout import generate as module
from qedjax.rollout.engine_config import EngineConfig
from qedjax.rollout.generate import generate_file, whole_file
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import tiny_config, tiny_tokenizer
from qedjax.types import SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_tokens=4, seed=3)
SIZES = EngineConfig(slots=3, staged=1, steps=2, prefill_tokens=64, prefill_rows=(1,), page_size=16)  # rounded up to two shards


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A workdir with one checkpoint of random weights, and its tokenizer."""
    root = tmp_path_factory.mktemp('generate')
    cfg = tiny_config(max_positions=256)
    model = create(lambda: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    save_tree(root / 'run' / 'checkpoints' / '1', {'model': model}, {'model': dataclasses.asdict(cfg)})
    tiny_tokenizer('open').save_pretrained(root / 'tokenizer')
    copy_tokenizer(root / 'tokenizer', root / 'run')
    return root / 'run'


def sample(run, folder, text, params=PARAMS, **kwargs):
    """The rows written for an input file of this text."""
    (folder / 'in.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
    kwargs = {'dtype': 'float32', 'tensor': 4, 'engine_config': SIZES, **kwargs}
    generate_file(str(run), str(folder / 'in.jsonl'), str(folder / 'out' / 'out.jsonl'), params, **kwargs)
    return [json.loads(line) for line in (folder / 'out' / 'out.jsonl').read_bytes().split(b'\n') if line]


def test_rows_come_back_whole_with_n_distinct_completions(run, tmp_path):
    odd = 'a\u2028b\u0085c\x0cd \\frac é'  # characters at which str.splitlines would cut a row
    rows = [{'prompt': '1+1', 'id': odd, 'n': 12345678901234567890},
            {'messages': [{'role': 'user', 'content': 'much longer than the other'}], 'prompt': None}]
    got = sample(run, tmp_path, '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), n=3)
    assert [{name: value for name, value in row.items() if name != 'completions'} for row in got] == rows
    for row in got:
        assert len({tuple(c['ids']) for c in row['completions']}) == 3
        for c in row['completions']:
            assert len(c['logprobs']) == len(c['ids'])
            assert (len(c['ids']), c['finish_reason']) == (4, 'length')
            assert (c['reasoning'], c['answer']) == (c['text'].strip('\n'), '')  # the prompt opens <think>, nothing closed it
    assert os.listdir(tmp_path / 'out') == ['out.jsonl']
    again = tmp_path / 'again'
    again.mkdir()
    assert sample(run, again, json.dumps(rows[0]), n=1)[0]['completions'][0]['ids'] == got[0]['completions'][0]['ids']


GOOD = '{"prompt": "1+1"}'
BAD = [
    ('', {}, 'holds no rows'),
    ('[1]', {}, 'in.jsonl:1 needs `prompt`'),
    (GOOD + '\n{"prompt": 3}', {}, 'in.jsonl:2 needs `prompt`'),
    (GOOD + '\n{"prompt": "x"', {}, 'in.jsonl:2 is not JSON'),
    (b'{"prompt": "\xff"}', {}, 'in.jsonl:1 is not JSON in UTF-8'),
    (r'{"prompt": "1", "note": "\ud800"}', {}, 'in.jsonl:1 is not JSON in UTF-8'),
    ('{"prompt": "1", "completions": []}', {}, 'in.jsonl:1 has `completions` already'),
    ('{"messages": []}', {}, 'input row 1: messages must be a list of at least one'),
    ('{"prompt": "1", "messages": []}', {}, 'input row 1: messages must be a list of at least one'),
    ('{"messages": [{"role": "user"}]}', {}, 'input row 1: message 0'),
    (GOOD, {'n': 0}, 'n must be at least 1'),
    (GOOD, {'engine_config': EngineConfig(slots=0)}, 'engine.slots must be at least 1'),
    (GOOD, {'engine_config': EngineConfig(page_size=-3)}, 'engine.page_size must be at least 1'),
    (GOOD, {'params': SamplingParams(top_p=2.0)}, 'the prompt of input row 1 asks for'),
    (GOOD, {'thinking': False}, 'always opens a think block'),
    (GOOD, {'params': SamplingParams(max_tokens=0)}, 'asks for max_tokens=0'),
    (GOOD, {'params': SamplingParams(max_tokens=256)}, 'the model has 256 positions'),
    (GOOD, {'params': SamplingParams(temperature=float('nan'))}, 'asks for temperature=nan'),
    (GOOD, {'params': SamplingParams(seed=-1)}, 'asks for seed=-1'),
    (GOOD, {'tensor': 3}, 'tensor=3 must divide the 8 devices'),
]


@pytest.mark.parametrize(('text', 'change', 'message'), BAD, ids=range(len(BAD)))
def test_whatever_is_wrong_is_said_before_weights_are_read(run, tmp_path, monkeypatch, text, change, message):
    monkeypatch.setattr(module, 'load_model', None)
    with pytest.raises(ValueError, match=message):
        sample(run, tmp_path, text, **change)
    assert not (tmp_path / 'out').exists()


def test_an_output_that_cannot_be_written_costs_no_sampling(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'load_model', None)
    (tmp_path / 'out').write_text('a file where a folder should be')
    with pytest.raises(OSError, match='out'):
        sample(run, tmp_path, GOOD)
    (tmp_path / 'out').unlink()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'out.jsonl').write_text('precious')
    with pytest.raises(ValueError, match='already exists'):
        sample(run, tmp_path, GOOD)
    assert (tmp_path / 'out' / 'out.jsonl').read_text() == 'precious'


def test_an_interruption_leaves_nothing_that_looks_like_an_output(run, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'load_model', interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(run, tmp_path, GOOD)
    assert os.listdir(tmp_path / 'out') == []


def test_without_a_chat_template_a_prompt_is_plain_text(run, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert module._encode(1, {'prompt': '1+1'}, tokenizer, None) == tuple(tokenizer.encode('1+1'))
    with pytest.raises(ValueError, match='has no chat template'):
        module._encode(1, {'messages': [{'role': 'user', 'content': '1+1'}]}, tokenizer, None)
    chat = tiny_tokenizer()
    np.testing.assert_array_equal(module._encode(1, {'prompt': '1+1'}, chat, None), prompt_ids(chat, [{'role': 'user', 'content': '1+1'}]))


def test_two_commands_do_not_write_one_output(tmp_path):
    """The second is refused, and leaves the first alone; what a killed one left is no hindrance."""
    path = tmp_path / 'out.jsonl'
    (tmp_path / '.out.jsonl.partial').write_text('half a ro')
    with whole_file(path) as first:
        first.write('first')
        with pytest.raises(ValueError, match='another command is writing'), whole_file(path):
            pass
    assert path.read_text() == 'first'
    assert [entry.name for entry in tmp_path.iterdir()] == ['out.jsonl']
