"""The loop whole, on a tiny model: what a step trains, resumes and refuses; on-policy ratios; a judge that misbehaves."""

import asyncio
import dataclasses
import json
import signal
import time
import types

import jax
import numpy as np
import pytest

from qedjax.checkpoint.hf import save_hf
from qedjax.data.sources import Source
from qedjax.grading.grade import Graded, Ungraded
from qedjax.grading.judge import JudgeConfig
from qedjax.grading.parser import neutralised
from qedjax.llm.client import EndpointError
from qedjax.llm.remote import RemoteConfig
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.processes import Preempted
from qedjax.rl import loop
from qedjax.rl.config import EvaluationConfig, RLConfig, validate
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import ScriptedServer, model_reply, tiny_config, tiny_tokenizer
from qedjax.train.optimizer import OptimizerConfig


class Vowels:
    """Grades by the share of vowels: any text earns something, and texts differ."""

    def check(self, row):
        pass

    async def grade(self, row, answer):
        return Graded(round(7 * sum(c in 'aeiou' for c in answer) / len(answer)) if answer else 0, 'vowels')

    def report(self):
        return {'vowels': 1}

    async def close(self):
        pass


class Slow(Vowels):
    """The same after a while that depends on the answer: groups finish out of order."""

    async def grade(self, row, answer):
        await asyncio.sleep(0.03 * (len(answer) % 7))
        return await super().grade(row, answer)


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
    """Folder of a tiny random model and its tokenizer, and a file of problems."""
    folder = tmp_path_factory.mktemp('policy')
    model = create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    save_hf(model, folder / 'model')
    tiny_tokenizer('none').save_pretrained(folder / 'model')
    rows = [{'problem': f'{a}+{b}', 'rubric': 'Seven points for the sum.', 'difficulty': (a + b) / 20} for a in range(4) for b in range(4)]
    (folder / 'problems.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def config(policy, **changes):
    base = RLConfig(
        init=str(policy / 'model'), model=ModelConfig(dtype='float32', attention_block=16, remat='none'),
        train=Source(str(policy / 'problems.jsonl')), problems=ProblemsConfig(max_prompt=24), group_size=3, groups=2, steps=3,
        temperature=0.9, max_tokens=12, optimizer=OptimizerConfig(learning_rate=1e-3, schedule='constant', warmup_fraction=0.0),
        mesh=MeshConfig(fsdp=1), row_length=64, micro_rows=2, save_every=1, seed=3,
        engine=EngineConfig(slots=8, staged=8, page_size=16, steps=4, prefill_tokens=64, prefill_rows=(1,)))
    return dataclasses.replace(base, **changes)


def train(cfg, workdir, grader=None):
    return loop.train(cfg, str(workdir), devices=jax.devices()[:1], grader=grader or Vowels())


def rows_of(workdir, name='metrics'):
    return [json.loads(line) for line in (workdir / f'{name}.jsonl').read_text().split('\n')[:-1]]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_synchronous_runs_are_equal_bit_by_bit_and_resume_exactly(policy, tmp_path, monkeypatch):
    """Whatever order grades come in; on policy in every step; interrupted after any step, and with the data then a function of the step."""
    cfg = config(policy, evaluation=EvaluationConfig(Source(str(policy / 'problems.jsonl')), problems=4))
    whole = train(cfg, tmp_path / 'whole')
    metrics = rows_of(tmp_path / 'whole')
    steps = [row for row in metrics if 'reward' in row]
    assert [row['step'] for row in steps] == [1, 2, 3]
    assert [row['step'] for row in metrics if 'eval/reward' in row] == [0, 3]
    assert all(row['log_ratio'] <= 1e-5 and row['lag_max'] == 0 and row['ess'] > 0.999 for row in steps)
    assert_equal(train(cfg, tmp_path / 'again', Slow()), whole)
    stop = iter(range(1, 9))
    step = loop.Learner.step

    def fail(self, state, groups):
        if next(stop) in (2, 4):
            raise KeyboardInterrupt
        return step(self, state, groups)

    monkeypatch.setattr(loop.Learner, 'step', fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(cfg, tmp_path / 'cut')
    assert_equal(train(cfg, tmp_path / 'cut'), whole)
    samples = [[{k: v for k, v in row.items() if k != 'time'} for row in rows_of(tmp_path / name, 'samples')] for name in ('whole', 'cut')]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 3 * 2 * 3


def test_in_flight_learning_bounds_staleness(policy, tmp_path):
    cfg = config(policy, steps=8, max_lag=2, in_flight=4, save_every=4)
    state = train(cfg, tmp_path, Slow())
    steps = rows_of(tmp_path)
    assert int(state.step) == len(steps) == 8
    assert max(row['lag_max'] for row in steps) in (1, 2)
    versions = [row['versions'] for row in rows_of(tmp_path, 'samples')]
    assert max(version for runs in versions for version, _ in runs) > 3
    draws = [row['draw'] for row in rows_of(tmp_path, 'samples')]
    assert all(draws.count(draw) == 3 for draw in set(draws))  # whole groups, each once
    assert all(abs(row['share/decode'] + row['share/learn'] + row['share/idle'] - 1) < 0.5 for row in steps)


@pytest.mark.parametrize('began_before', [0.0, 30.0])
def test_shares_of_a_step_are_of_its_time(began_before):
    """Whatever part of a chunk that ends in it was decoded before."""
    engine = types.SimpleNamespace(stats=types.SimpleNamespace(worked=1.0, waited=1.0))
    clock = loop._Clock(engine)
    time.sleep(0.02)
    engine.stats.waited += 0.005 + began_before
    clock.lap('collect')
    clock.lap('learn')
    shares = clock.shares()
    assert shares['share/decode'] + shares['share/learn'] + shares['share/idle'] == pytest.approx(1)
    assert min(shares.values()) >= 0


def test_what_was_under_way_is_drawn_again_after_a_restart(policy, tmp_path):
    cfg = config(policy, steps=2, max_lag=3, in_flight=5, save_every=1)
    train(cfg, tmp_path, Slow())
    train(dataclasses.replace(cfg, steps=6), tmp_path, Slow())
    draws = sorted({row['draw'] for row in rows_of(tmp_path, 'samples')})
    assert len(draws) == 12
    assert set(range(8)) <= set(draws)  # none is skipped for good


def test_ungraded_answers_and_groups_are_left_out(policy, tmp_path):
    class Moody(Vowels):
        async def grade(self, row, answer):
            return Ungraded('no mood') if len(answer) % 2 else await super().grade(row, answer)

    train(config(policy, steps=2), tmp_path, Moody())
    for row in rows_of(tmp_path, 'samples'):
        assert (row['reward'] is None) == (row['feedback'] == 'no mood')
    assert any(row['ungraded'] > 0 for row in rows_of(tmp_path))


def test_no_step_is_made_of_nothing(policy, tmp_path):
    class Silent(Vowels):
        async def grade(self, row, answer):
            return Ungraded('silence')

    with pytest.raises(RuntimeError, match='of 20 groups none could be trained'):
        train(config(policy), tmp_path, Silent())


def test_groups_without_variance_are_refilled(policy, tmp_path):
    class Half(Vowels):
        async def grade(self, row, answer):
            return Graded(3) if row['problem'].startswith(('0', '1')) else await super().grade(row, answer)

    train(config(policy, objective=ObjectiveConfig(zero_variance='refill'), steps=2), tmp_path, Half())
    steps = rows_of(tmp_path)
    assert all(row['zero_variance'] == 0 for row in steps)
    assert sum(row['dropped/zero_variance'] for row in steps) > 0


def test_a_kl_penalty_to_the_start_begins_at_zero(policy, tmp_path):
    train(config(policy, objective=ObjectiveConfig(kl_coef=0.1), steps=2), tmp_path)
    first, second = rows_of(tmp_path)
    assert abs(first['kl']) < 1e-6 < second['kl']


JUDGE = JudgeConfig(RemoteConfig('', 'judge', timeout=1.0, attempts=4, first_wait=0.01, longest_wait=0.05), tries=3, breaker=6)


def truth(body):
    """The scripted judge's honest mark: a function of what it was asked."""
    return sum(body['messages'][0]['content'].encode()) % 8


def test_a_judge_that_misbehaves_invents_nothing(policy, tmp_path):
    """30% of the calls go wrong in every way; each reward is the scripted truth or missing."""
    faults = [(429, {'retry-after': '0.01'}, {}), (500, {}, {}), (1.5, 'late'), b'{"choices": [{"mess', model_reply(''), 'no tag',
              '<score>9</score>', '<score>7</score> says the student']
    said = {}

    def reply(number, body):
        said[body['messages'][0]['content']] = truth(body)
        return faults[number // 10 % len(faults)] if number % 10 in (1, 4, 7) else f'Seen.\n<score>{truth(body)}</score>'

    with ScriptedServer(reply) as server:
        judge = dataclasses.replace(JUDGE, remote=dataclasses.replace(JUDGE.remote, base_url=server.base_url))
        train_with_judge(config(policy, steps=3, grader='judge', judge=judge), tmp_path)
        asked = len(server.calls)
    assert asked > 20
    rows = [row for row in rows_of(tmp_path, 'samples') if row['answer'].strip()]
    assert sum(row['reward'] is not None for row in rows) > len(rows) / 2
    for row in rows:
        shown = f'\n{neutralised(row["answer"])}\n~~~~'
        marks = [mark / 7 for content, mark in said.items() if shown in content and f'\n{row["problem"]}\n' in content]
        assert row['reward'] is None or row['reward'] in marks
    steps = rows_of(tmp_path)
    assert all('ungraded' in row for row in steps)
    assert steps[-1]['grader/calls'] == asked
    assert steps[-1]['grader/retries'] > 0
    assert steps[-1]['grader/graded'] >= sum(row['reward'] is not None for row in rows)


def train_with_judge(cfg, workdir):
    return loop.train(cfg, str(workdir), devices=jax.devices()[:1])


def test_the_breaker_stops_the_run_and_it_goes_on_without_paying_twice(policy, tmp_path):
    asked, answered, left = [], [], iter(range(8))  # next() is atomic: the server answers from several threads

    def reply(number, body):
        asked.append(body['messages'][0]['content'])
        if next(left, None) is None:
            return 500, {}, {}
        answered.append(body['messages'][0]['content'])
        return f'<score>{truth(body)}</score>'

    with ScriptedServer(reply) as server:
        judge = dataclasses.replace(JUDGE, remote=dataclasses.replace(JUDGE.remote, base_url=server.base_url, attempts=1), breaker=2)
        cfg = config(policy, steps=4, grader='judge', judge=judge)
        with pytest.raises(EndpointError, match='2 answers in a row'):
            train_with_judge(cfg, tmp_path)
        assert len(answered) == 8
        done = len([row for row in rows_of(tmp_path) if 'reward' in row])
        assert 0 < done < 4
        asked.clear()
        with pytest.raises(EndpointError):
            train_with_judge(cfg, tmp_path)
        assert asked
        assert not set(answered) & set(asked)
        assert len([row for row in rows_of(tmp_path) if 'reward' in row]) == done
    with ScriptedServer(lambda number, body: f'<score>{truth(body)}</score>') as server:
        judge = dataclasses.replace(judge, remote=dataclasses.replace(judge.remote, base_url=server.base_url))
        whole = train_with_judge(dataclasses.replace(cfg, judge=judge), tmp_path / 'whole')
        assert_equal(train_with_judge(dataclasses.replace(cfg, judge=judge), tmp_path), whole)  # no draw is skipped


def test_what_may_change_between_two_starts(policy):
    """Where and how fast a run goes, but nothing that its parameters depend on."""
    def identity(**changes):
        return loop.fingerprint(config(policy, **changes), tiny_config(), [])

    same = {'mesh': MeshConfig(fsdp=2), 'engine': EngineConfig(slots=64), 'steps': 99, 'save_every': 7, 'in_flight': 9, 'micro_rows': 8,
            'judge': dataclasses.replace(JUDGE, breaker=99, remote=dataclasses.replace(JUDGE.remote, base_url='http://there', budget=9.0))}
    other = {'seed': 4, 'temperature': 0.5, 'max_tokens': 9, 'group_size': 4, 'objective': ObjectiveConfig(loss='cispo'), 'max_lag': 1,
             'optimizer': OptimizerConfig(learning_rate=0.5), 'judge': dataclasses.replace(JUDGE, temperature=0.5)}
    base = {'grader': 'judge', 'judge': JUDGE}
    assert all(identity(**(base | {name: value})) == identity(**base) for name, value in same.items())
    assert all(identity(**(base | {name: value})) != identity(**base) for name, value in other.items())


def test_held_out_problems_are_of_any_difficulty(policy, tmp_path):
    filtered = ProblemsConfig(max_prompt=24, least=0.0, most=0.2)
    cfg = config(policy, steps=1, problems=filtered, evaluation=EvaluationConfig(Source(str(policy / 'problems.jsonl'))))
    run = loop._Run(cfg, tmp_path, jax.devices()[:1], Vowels())
    assert (len(run.problems), len(run.held_out)) == (12, 16)


class DiesLater(Vowels):
    """Cannot grade any more after so many answers."""

    def __init__(self, count, error):
        self.left, self.error = count, error

    async def grade(self, row, answer):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return await super().grade(row, answer)


@pytest.mark.parametrize(('count', 'error', 'steps'), [(14, EndpointError('gone'), 2), (9, RuntimeError('ours'), 1),
                                                       (20, EndpointError('gone'), 3)])
def test_what_was_learnt_is_saved_whatever_ends_the_run(policy, tmp_path, count, error, steps):
    """In collecting, by whatever error, and in the last evaluation."""
    cfg = config(policy, save_every=5)
    if steps == 3:
        cfg.evaluation = EvaluationConfig(Source(str(policy / 'problems.jsonl')), every=3, problems=4)
        count += 4
    with pytest.raises(type(error), match=str(error)):
        train(cfg, tmp_path, DiesLater(count, error))
    assert [int(path.name) for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()] == [steps]


class Preempts(Vowels):
    """After so many answers the machine is to be taken away, and no more grades come."""

    def __init__(self, count):
        self.left, self.told = count, 0.0

    async def grade(self, row, answer):
        self.left -= 1
        if self.left < 0:
            self.told = self.told or time.monotonic()
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(3600)
        return await super().grade(row, answer)


@pytest.mark.parametrize(('count', 'evaluated', 'lag', 'steps'), [(0, 0, 0, [()]), (14, 0, 0, [(2,)]), (10, 2, 0, [(1,)]),
                                                                  (14, 0, 2, [(1,), (2,)])])
def test_sigterm_ends_a_step_at_once_and_loses_no_finished_one(policy, tmp_path, count, evaluated, lag, steps):
    """While groups are collected, also those of an evaluation; what was under way is drawn again."""
    before = signal.getsignal(signal.SIGTERM)
    held_out = EvaluationConfig(Source(str(policy / 'problems.jsonl') * bool(evaluated)), every=1, problems=evaluated)
    cfg = config(policy, save_every=5, evaluation=held_out, max_lag=lag, in_flight=3 * bool(lag))
    grader = Preempts(count)
    with pytest.raises(Preempted):
        train(cfg, tmp_path / 'cut', grader)
    assert time.monotonic() - grader.told < 5
    assert signal.getsignal(signal.SIGTERM) == before
    assert tuple(int(path.name) for path in (tmp_path / 'cut' / 'checkpoints').iterdir() if path.name.isdigit()) in steps
    again = train(cfg, tmp_path / 'cut')
    if not lag:
        assert_equal(again, train(cfg, tmp_path / 'whole'))
    draws = [row['draw'] for row in rows_of(tmp_path / 'cut', 'samples')]
    assert all(draws.count(draw) == 3 for draw in set(draws))
    assert set(range(6 - cfg.in_flight)) <= set(draws)


class BreaksDown(Preempts):
    async def grade(self, row, answer):
        self.left -= 1
        if self.left < 0:
            raise EndpointError('no more grades')
        return await Vowels.grade(self, row, answer)


@pytest.mark.parametrize('grader', [Preempts, BreaksDown])
def test_an_evaluation_that_was_cut_is_made_up_for(policy, tmp_path, grader):
    """Of the last step here; the run is complete only with it."""
    held_out = EvaluationConfig(Source(str(policy / 'problems.jsonl')), every=2, problems=2)
    cfg = config(policy, steps=2, evaluation=held_out)
    train(cfg, tmp_path / 'whole')
    with pytest.raises((Preempted, EndpointError)):
        train(cfg, tmp_path / 'cut', grader(2 + 2 * 2 * 3 + 1))  # before the first step, both steps, and half of the last
    train(cfg, tmp_path / 'cut')
    scores = [[(row['step'], row['eval/reward']) for row in rows_of(tmp_path / name, 'metrics') if 'eval/reward' in row]
              for name in ('whole', 'cut')]
    assert [step for step, _ in scores[0]] == [0, 2]
    assert scores[0] == scores[1]


def test_a_run_does_not_replace_what_it_starts_from(policy):
    with pytest.raises(ValueError, match='lies in the workdir'):
        loop.train(config(policy), str(policy), mode='overwrite')
    with pytest.raises(ValueError, match=r'reference=.* lies in the workdir'):
        loop.train(config(policy, init=str(policy), reference=str(policy / 'model')), str(policy / 'model'))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'init': ''}, 'needs a policy'), ({'grader': 'me'}, "grader is 'me'"), ({'temperature': 0.0}, 'temperature=0.0 must be'),
    ({'group_size': 1}, 'group_size must be at least 2'), ({'row_length': 20}, 'do not fit row_length=20'),
    ({'max_lag': 1, 'in_flight': 1}, 'at least the 2 of a step'), ({'seed': -1}, 'seed must be'),
    ({'problems': ProblemsConfig(prompt='solve it')}, 'must hold {problem} once'),
    ({'objective': ObjectiveConfig(loss='dpo')}, "objective.loss is 'dpo'")])
def test_runs_that_cannot_start_are_refused(policy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        validate(config(policy, **changes))


@pytest.mark.parametrize(('changes', 'message'), [
    ({'problems': ProblemsConfig(max_prompt=3)}, 'no problem is left'),
    ({'problems': ProblemsConfig(least=0.9, max_prompt=24)}, 'no problem is left'),
    ({'grader': 'answers'}, '16 of 16 rows cannot be graded, e.g. row 1: the problem has no answer'),
    ({'engine': EngineConfig(cache_tokens=16, page_size=16)}, 'cache of a shard holds 16'),
    ({'evaluation': EvaluationConfig(top_p=1.5)}, 'top_p=1.5'),
    ({'model': ModelConfig(dtype='float32', attention='cudnn', remat='none')}, 'cudnn'),
    ({'train': Source('nowhere.jsonl')}, 'nowhere.jsonl'), ({'micro_rows': 3, 'mesh': MeshConfig(fsdp=2)}, 'micro_rows=3')])
def test_what_data_and_sizes_refuse_is_said_before_weights_are_read(policy, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(loop, 'load_model', lambda *_: pytest.fail('weights were read'))
    with pytest.raises(ValueError, match=message):
        loop.train(config(policy, **changes), str(tmp_path / 'run'), grader=None if 'grader' in changes else Vowels(),
                   devices=jax.devices()[:2] if 'mesh' in changes else jax.devices()[:1])
    assert not (tmp_path / 'run' / 'checkpoints').exists()
