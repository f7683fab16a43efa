"""Runs that cannot work are refused before the workdir is touched, and a run begun anew takes nothing from the one before."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs.tiny_sft import get_config
from qedjax.data.sources import Source
from qedjax.sharding import MeshConfig
from qedjax.testing import tiny_config, tiny_tokenizer, write_sums
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import MonitorConfig, encode_rows, train, validate

MESH = MeshConfig(fsdp=4, tensor=2)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sums')
    write_sums(folder)
    return folder


BAD = [
    ({'seed': -1}, 'seed must be in'),
    ({'seed': 2**32}, 'seed must be in'),
    ({'save_every': -1}, 'save_every must be at least 0'),
    ({'evaluate_every': -1}, 'evaluate_every must be at least 0'),
    ({'keep': 0}, 'keep must be at least 1'),
    ({'keep_every': -2}, 'keep_every must be at least 0'),
    ({'max_skipped': 0}, 'max_skipped must be at least 1'),
    ({'batch_size': 0}, 'batch at least 1'),
    ({'monitor': MonitorConfig(prompts=2, max_tokens=0)}, 'monitor needs positive'),
    ({'monitor': MonitorConfig(prompts=-2)}, 'monitor needs positive'),
    ({'monitor': MonitorConfig(prompts=2, ngram=0)}, 'monitor needs positive'),
    ({'monitor': MonitorConfig(prompts=2, temperature=float('nan'))}, 'monitor needs positive'),
    ({'monitor': MonitorConfig(prompts=2, max_tokens=4096)}, 'leaves no room for a held-out prompt'),
    ({'evaluation': Source()}, 'the monitor samples from held-out prompts'),
    ({'evaluation': Source('nowhere.jsonl')}, 'nowhere.jsonl'),
    ({'mesh': MeshConfig(fsdp=1, tensor=8)}, 'the kv_heads axis has 4 entries'),
    ({'mesh': MeshConfig(fsdp=1, tensor=2, context=4), 'row_length': 126}, 'cannot be shared evenly'),
    ({'mesh': MeshConfig(fsdp=2, tensor=4), 'model': tiny_config(embed_dim=33)}, 'embed axis has 33 entries'),
    ({'mesh': MeshConfig(fsdp=-1, tensor=3)}, 'needs a multiple of 3 devices'),
]


@pytest.mark.parametrize(('change', 'message'), BAD, ids=[f'{"-".join(change)}-{i}' for i, (change, _) in enumerate(BAD)])
@pytest.mark.parametrize('mode', ['resume', 'overwrite'])
def test_a_refused_run_changes_no_file(data, tmp_path, change, message, mode):
    (tmp_path / 'run' / 'checkpoints' / '7').mkdir(parents=True)
    (tmp_path / 'run' / 'checkpoints' / '7' / 'precious').write_text('x')
    cfg = dataclasses.replace(dataclasses.replace(get_config(str(data)), mesh=MESH), **change)
    with pytest.raises(ValueError, match=message):
        train(cfg, str(tmp_path / 'run'), mode=mode)
    assert [path.name for path in (tmp_path / 'run').rglob('*')] == ['checkpoints', '7', 'precious']


@pytest.mark.parametrize('change', [
    {'b1': 1.0}, {'b2': 1.0}, {'b2': -0.1}, {'eps': 0.0}, {'learning_rate': -1.0}, {'learning_rate': float('inf')}, {'clip_norm': -1.0},
    {'learning_rate': float('nan')}, {'weight_decay': float('nan')}, {'final_fraction': -1.0}, {'warmup_fraction': 1.5}, {'name': 'adam'}])
def test_an_optimizer_that_would_break_the_weights_is_named(change):
    cfg = dataclasses.replace(get_config(), optimizer=dataclasses.replace(OptimizerConfig(), **change))
    with pytest.raises(ValueError, match=f'optimizer.{next(iter(change))} is'):
        validate(cfg)


@pytest.mark.parametrize('init', ['run', 'run/checkpoints', 'run/checkpoints/7'])
@pytest.mark.parametrize('mode', ['resume', 'overwrite'])
def test_a_run_does_not_begin_from_the_checkpoints_that_it_would_replace(data, tmp_path, init, mode):
    cfg = dataclasses.replace(get_config(str(data)), init=str(tmp_path / init))
    with pytest.raises(ValueError, match='lies in the workdir'):
        train(cfg, str(tmp_path / 'run'), mode=mode)


def test_an_empty_held_out_file_is_named(data, tmp_path):
    for name, text in (('empty', ''), ('blank', '\n\n')):
        (tmp_path / f'{name}.jsonl').write_text(text)
        cfg = dataclasses.replace(get_config(str(data)), mesh=MESH, evaluation=Source(str(tmp_path / f'{name}.jsonl')))
        with pytest.raises(ValueError, match=f'{name}.jsonl'):
            train(cfg, str(tmp_path / 'run'))


@pytest.mark.slow
def test_a_run_begun_anew_takes_its_own_tokenizer(data, tmp_path):
    """What a workdir keeps of a run that is overwritten, or that was killed before its first checkpoint, is not the next run's."""
    other = tmp_path / 'other'
    shutil.copytree(data / 'tokenizer', other)
    (other / 'generation_config.json').write_text('{"eos_token_id": 265}')
    cfg = dataclasses.replace(get_config(str(data)), mesh=MeshConfig(), steps=1, evaluation=Source(), monitor=MonitorConfig())
    files = tmp_path / 'run' / 'hf_files'
    for folder, mode, expected in ((data / 'tokenizer', 'resume', False), (other, 'resume', False), (other, 'overwrite', True)):
        train(dataclasses.replace(cfg, tokenizer=str(folder)), str(tmp_path / 'run'), mode=mode, devices=jax.devices()[:1])
        assert (files / 'generation_config.json').exists() == expected, (folder, mode)
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    train(dataclasses.replace(cfg, tokenizer=str(data / 'tokenizer')), str(tmp_path / 'run'), devices=jax.devices()[:1])
    assert not (files / 'generation_config.json').exists()


@pytest.mark.parametrize(('turns', 'dropped'), [('last', len('first thought')), ('all', 0)])
def test_reasoning_that_is_not_trained_is_counted(caplog, turns, dropped):
    question = [{'role': 'user', 'content': 'q'}]
    answers = [{'role': 'assistant', 'content': 'a', 'reasoning_content': text} for text in ('first thought', 'second')]
    rows = [{'messages': [*question, answers[0], *question, answers[1]]}, {'messages': [*question, answers[0]]}]
    with caplog.at_level('WARNING'):
        list(encode_rows(rows, tiny_tokenizer(), turns, Source('chats.jsonl')))
    assert (f'leaves {dropped} characters' in caplog.text) == bool(dropped)
    assert bool(caplog.text) == bool(dropped)


def test_the_logged_learning_rate_is_the_one_applied(data, tmp_path, monkeypatch):
    """A skipped step does not move the schedule, so the log must not either."""
    from qedjax.train import sft

    def poisoned(batch, mesh, accumulation, place=sft.place_batch, count=[0]):  # noqa: B006
        count[0] += 1
        placed = place(batch, mesh, accumulation)
        return dataclasses.replace(placed, weights=placed.weights * np.inf) if count[0] == 3 else placed  # 1 is the trial, so step 2

    monkeypatch.setattr(sft, 'place_batch', poisoned)
    cfg = dataclasses.replace(get_config(str(data)), mesh=MESH, steps=4, evaluation=Source(), monitor=MonitorConfig(), save_every=4,
                              optimizer=OptimizerConfig(learning_rate=1.0, warmup_fraction=1.0, name='sgd', b1=0.0))
    train(cfg, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [row['skipped'] for row in rows] == [0, 1, 1, 1]
    np.testing.assert_allclose([rows[i]['learning_rate'] for i in (0, 2, 3)], [0.25, 0.5, 0.75])
