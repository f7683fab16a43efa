"""The quickstart from end to end, as small as it gets, and again after it was cut off; when a chain of it ends."""

import asyncio
import dataclasses
import json

import pytest

from qedjax.quickstart import QuickstartConfig, finished, run
from qedjax.rl.losses import ObjectiveConfig


def test_a_chain_ends_with_its_proof():
    answers = ('a 1+1=2', 'a 1+1=2\nAnswer: 2', 'From a=2\nAnswer: 2\n', 'Answer: 2\nb', '')
    assert [asyncio.run(finished('p', answer)) for answer in answers] == [False, True, True, False, False]


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path):
    keep = {'steps': 1, 'groups': 4, 'objective': ObjectiveConfig(zero_variance='keep')}
    cfg = QuickstartConfig(documents=48, problems=4, turns=(1, 2), rl_problems=32)
    cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, **keep), rc=dataclasses.replace(cfg.rc, **keep))
    curves = run(cfg, tmp_path)
    assert list(curves) == ['SFT', 'RL', 'RC-RL']
    assert all([p.turns for p in points] == [1, 2] for points in curves.values())
    rows = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert [row['model'] for row in rows] == ['SFT'] * 4 + ['RL'] * 4 + ['RC-RL'] * 4
    assert all([phase for phase, _ in row['calls']][:2] == ['reason', 'summarise'] for row in rows)
    assert (tmp_path / 'turns.png').exists()
    assert (tmp_path / 'export' / 'model.safetensors').exists()
    with pytest.raises(ValueError, match='holds a finished quickstart'):
        run(cfg, tmp_path)
    with pytest.raises(ValueError, match='problems=1 are too few'):
        run(dataclasses.replace(cfg, problems=1), tmp_path / 'other')
