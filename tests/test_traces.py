"""launch/generate.py --turns: traces of chains for a file of problems, and what is refused before weights are read."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from qedjax.checkpoint.load import copy_tokenizer
from qedjax.checkpoint.manager import save_tree
from qedjax.model.transformer import Transformer
from qedjax.reasoning_cache import generate as module
from qedjax.reasoning_cache import state
from qedjax.reasoning_cache.decoder import PhaseConfig, RCConfig
from qedjax.reasoning_cache.generate import generate_traces
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import State, trace_from
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import tiny_config, tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
CFG = RCConfig(3, PhaseConfig(12), PhaseConfig(6), prompts=RENDERINGS['derivations'])
SIZES = EngineConfig(slots=3, staged=1, steps=2, prefill_tokens=64, prefill_rows=(1,), page_size=16)
ROWS = [{'prompt': '1 a+1 b+2', 'id': 'x\u2028'}, {'prompt': '3 q+4 r*7 s-2'}]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A workdir with one checkpoint of random weights, and its tokenizer."""
    root = tmp_path_factory.mktemp('traces')
    cfg = tiny_config(max_positions=128)
    model = create(lambda: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    save_tree(root / 'run' / 'checkpoints' / '1', {'model': model}, {'model': dataclasses.asdict(cfg)})
    tiny_tokenizer('none').save_pretrained(root / 'tokenizer')
    copy_tokenizer(root / 'tokenizer', root / 'run')
    return root / 'run'


def sample(run, folder, rows=ROWS, cfg=CFG, **kwargs):
    """The rows written for these."""
    (folder / 'in.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    generate_traces(str(run), str(folder / 'in.jsonl'), str(folder / 'out' / 'out.jsonl'), cfg,
                    **{'dtype': 'float32', 'tensor': 4, 'engine_config': SIZES, 'n': 2, **kwargs})
    return [json.loads(line) for line in (folder / 'out' / 'out.jsonl').read_bytes().split(b'\n') if line]


def test_rows_come_back_whole_with_n_traces_also_after_a_kill(run, tmp_path, monkeypatch):
    write = module.Journal.committed

    def killed(journal, key, trace):
        write(journal, key, trace)
        if journal.count == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Journal, 'committed', killed)
        with pytest.raises(KeyboardInterrupt):
            sample(run, tmp_path)
    assert os.listdir(tmp_path / 'out') == ['out.jsonl.calls']
    with pytest.raises(ValueError, match='other problems, settings or weights'):
        sample(run, tmp_path, seed=1)
    got = sample(run, tmp_path)
    assert os.listdir(tmp_path / 'out') == ['out.jsonl']
    (tmp_path / 'again').mkdir()
    ids = [[[call['completion']['ids'] for call in trace['calls']] for trace in row['traces']] for row in got]
    assert ids == [[[call['completion']['ids'] for call in trace['calls']] for trace in row['traces']]
                   for row in sample(run, tmp_path / 'again')]
    assert [{name: value for name, value in row.items() if name != 'traces'} for row in got] == ROWS
    assert len({str(trace) for row in ids for trace in row}) == 4
    for row in got:
        for found in row['traces']:
            trace = trace_from(found)
            assert trace.start == State(row['prompt'])
            assert (trace.end, len(trace.calls), trace.tokens) == ('turns', 5, found['tokens'])
            assert trace.answer == (found['answer'], found['turn'])


BAD = [
    ([{'messages': [{'role': 'user', 'content': '1+1'}]}], {}, 'input row 1 needs `prompt`'),
    ([{'prompt': '1'}, {'prompt': ' '}], {}, 'input row 2 needs `prompt`'),
    ([{'prompt': '1', 'traces': 1}], {}, 'has `traces` already'),
    (ROWS, {'n': 0}, 'n=0 must be at least 1'),
    (ROWS, {'seed': -1}, 'seed=-1 not negative'),
    (ROWS, {'cfg': dataclasses.replace(CFG, turns=0)}, 'turns must be at least 1'),
    (ROWS, {'cfg': dataclasses.replace(CFG, reason=PhaseConfig(100))}, 'the longest prompt of a chain of input row 1 has'),
    (ROWS, {'cfg': dataclasses.replace(CFG, summarise=PhaseConfig(100))}, 'the model has 128 positions; shorten either'),
    (ROWS, {'cfg': dataclasses.replace(CFG, turns=40, mode='append')}, 'the model has 128 positions'),
    (ROWS, {'cfg': dataclasses.replace(CFG, reason=PhaseConfig(12, top_p=3.0))}, 'top_p=3.0'),
    (ROWS, {'cfg': dataclasses.replace(CFG, prompts=RENDERINGS['proof'])}, 'the longest prompt of a chain of input row 1 has'),
]


@pytest.mark.parametrize(('rows', 'change', 'message'), BAD, ids=range(len(BAD)))
def test_whatever_is_wrong_is_said_before_weights_are_read(run, tmp_path, monkeypatch, rows, change, message):
    monkeypatch.setattr(module, 'load_model', None)
    with pytest.raises(ValueError, match=message):
        sample(run, tmp_path, rows, **change)
    assert not (tmp_path / 'out').exists()


def test_the_command(run, tmp_path):
    (tmp_path / 'in.jsonl').write_text(json.dumps(ROWS[0]))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'launch/generate.py'), f'--checkpoint={run}', f'--input={tmp_path}/in.jsonl',
         f'--output={tmp_path}/out.jsonl', '--turns=2', '--max_tokens=8', '--summary_tokens=4', '--dtype=float32', '--slots=8',
         '--rendering=derivations'],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / 'out.jsonl').read_text())
    calls = row['traces'][0]['calls']
    assert [call['phase'] for call in calls] == ['reason', 'summarise', 'reason']
    assert all(len(call['completion']['ids']) <= (8 if call['phase'] == 'reason' else 4) for call in calls)


def test_empty_summaries_are_told_of(run, tmp_path, monkeypatch):
    """A model whose thinking takes the whole budget of a summary leaves none, and its turns know nothing of each other."""
    told = []
    monkeypatch.setattr(module.logging, 'warning', lambda text, *args: told.append(text % args))
    sample(run, tmp_path)
    assert told == []
    monkeypatch.setattr(state, 'final_part', lambda *_: state.Sampled())
    (tmp_path / 'empty').mkdir()
    sample(run, tmp_path / 'empty')
    assert len(told) == 1
    assert told[0].startswith('8 of 8 summaries were empty')
