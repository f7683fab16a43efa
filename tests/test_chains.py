"""RL from states of chains: reproducible and resumed exactly when synchronous; what is trained, stored and refused."""

import asyncio
import dataclasses
import json
import types

import pytest
from test_rl_loop import DiesLater, Slow, Vowels, assert_equal, config, policy, rows_of, train  # noqa: F401

from qedjax.data.chat import prompt_ids
from qedjax.data.sources import Source
from qedjax.llm.client import EndpointError
from qedjax.llm.remote import RemoteConfig
from qedjax.reasoning_cache.decoder import PhaseConfig, RCConfig
from qedjax.reasoning_cache.prompts import PromptsConfig
from qedjax.reasoning_cache.state import Sampled, State, advance, begin
from qedjax.reasoning_cache.states import Stored
from qedjax.rl import loop
from qedjax.rl.chains import Chains, ChainsConfig
from qedjax.rl.collector import Collector
from qedjax.rl.config import validate
from qedjax.rl.problems import Problem, ProblemsConfig
from qedjax.testing import ScriptedServer, tiny_tokenizer
from qedjax.types import Completion, Group

PROMPTS = PromptsConfig('bare', 'derivations_continue', 'derivations_summarise')
DECODING = RCConfig(3, PhaseConfig(10, 0.9), PhaseConfig(6, 0.9), prompts=PROMPTS)
CHAINS = ChainsConfig(2, DECODING, replay=4, horizon=6)


def chained(policy, **changes):  # noqa: F811
    return config(policy, **{'chains': CHAINS, 'groups': 4, 'steps': 4, 'row_length': 96, **changes})


@pytest.mark.slow
def test_synchronous_runs_are_equal_bit_by_bit_and_resume_exactly(policy, tmp_path, monkeypatch):  # noqa: F811
    """Whatever order grades come in, the buffer of summaries included."""
    whole = train(chained(policy), tmp_path / 'whole')
    assert all(row['log_ratio'] <= 1e-5 and row['lag_max'] == 0 for row in rows_of(tmp_path / 'whole'))
    assert_equal(train(chained(policy), tmp_path / 'again', Slow()), whole)
    stop, step = iter(range(1, 9)), loop.Learner.step

    def fail(self, state, groups):
        if next(stop) in (2, 4):
            raise KeyboardInterrupt
        return step(self, state, groups)

    monkeypatch.setattr(loop.Learner, 'step', fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(chained(policy), tmp_path / 'cut')
    assert_equal(train(chained(policy), tmp_path / 'cut'), whole)
    samples = [rows_of(tmp_path / name, 'samples') for name in ('whole', 'again', 'cut')]
    assert samples[0] == samples[1] == samples[2]


def test_each_group_answers_one_state_and_is_graded_by_the_problem_itself(policy, tmp_path, monkeypatch):  # noqa: F811
    """The trained prompt is what decoding would ask from (problem, summary); states of a draw differ."""
    trained, step, tokenizer = [], loop.Learner.step, tiny_tokenizer('none')

    def record(self, state, groups):
        trained.extend(groups)
        return step(self, state, groups)

    monkeypatch.setattr(loop.Learner, 'step', record)
    shown = []

    class Watching(Vowels):
        async def grade(self, row, answer):
            shown.append(row['problem'])
            return await super().grade(row, answer)

    train(chained(policy, steps=2), tmp_path, Watching())
    assert set(shown) == {group.problem for group in trained}
    assert all('\n' not in problem for problem in shown)
    for group in trained:
        text = group.problem if not group.summary.strip() else f'{group.problem}\n{group.summary}'
        prompt = group.rollouts[0].completion.prompt_ids
        assert tokenizer.decode(prompt) == tokenizer.decode(prompt_ids(tokenizer, [{'role': 'user', 'content': text}]))
        assert len({r.completion.ids for r in group.rollouts}) > 1
    draws = [(group.draw, group.turn) for group in trained]
    assert len(set(draws)) == len(draws) == 8
    assert {draw for draw, _ in draws} == {0, 1, 2, 3}
    rows = rows_of(tmp_path, 'samples')
    assert {(row['draw'], row['turn'], row['summary']) for row in rows} == {(g.draw, g.turn, g.summary) for g in trained}


def test_in_flight_chains_and_groups_share_the_engine(policy, tmp_path):  # noqa: F811
    state = train(chained(policy, steps=6, max_lag=2, in_flight=4), tmp_path, Slow())
    steps = rows_of(tmp_path)
    assert int(state.step) == len(steps) == 6
    assert max(row['lag_max'] for row in steps) <= 2


@pytest.mark.slow
@pytest.mark.parametrize('replay', [4, 0])
def test_replay_reaches_later_turns(policy, tmp_path, replay):  # noqa: F811
    """16 problems for 3 epochs and more: with a buffer for all, chains begin where earlier ones ended."""
    chains = dataclasses.replace(CHAINS, replay=16 * bool(replay), horizon=0)
    train(chained(policy, chains=chains, groups=8, steps=10, save_every=10), tmp_path)
    turns = [row['turn'] for row in rows_of(tmp_path, 'samples')]
    assert (max(turns) > 2) == bool(replay)
    manifest = json.loads((tmp_path / 'checkpoints' / '10' / 'manifest.json').read_text())
    stored = manifest['metadata']['position']['chains']['replay']
    assert len(stored) == (16 if replay else 0)


def test_a_kept_summary_keeps_the_version_that_wrote_it():
    """An empty summary leaves the old one, which is no newer for that."""
    start, tokenizer = Stored(State('3 a+4', (Sampled('a=7', (1,)),), 1), 5), tiny_tokenizer('none')
    chains = Chains(CHAINS, None, tokenizer, (), 0, [Problem((1,), {'problem': '3 a+4'})])
    trace = begin(start.state)
    for text, version in (('a 3+4=7', 8), ('', 8), ('a 3+4=7', 9), ('a=7', 9)):
        completion = Completion(text, tuple(tokenizer.encode(text)), (), 'stop', versions=((version, 1),))
        trace = advance(trace, completion, tokenizer, tokenizer, 6)
    chains._end(0, 0, start.version, trace)
    assert [(entry.state.turn, entry.version) for entry in chains.replay.stored[0]] == [(2, 5), (3, 9)]


def test_another_model_may_summarise(policy, tmp_path):  # noqa: F811
    with ScriptedServer(lambda number, body: f'sum {body["messages"][0]["content"][:1]}') as server:
        summariser = RemoteConfig(server.base_url, 'summariser', first_wait=0.01)
        train(chained(policy, steps=2, chains=dataclasses.replace(CHAINS, summariser=summariser)), tmp_path)
        assert len(server.calls) >= 4 * 3
    summaries = {row['summary'] for row in rows_of(tmp_path, 'samples')}
    assert summaries - {''} <= {f'sum {digit}' for digit in range(4)}


def test_a_summariser_that_is_gone_stops_the_run_with_its_state_saved(policy, tmp_path):  # noqa: F811
    """One failure costs a chain its later states; many in a row are no way to train."""
    down = (503, {}, {'error': {'message': 'down'}})
    with ScriptedServer(lambda number, body: 'sum' if number < 4 or number == 5 else down) as server:
        summariser = RemoteConfig(server.base_url, 'summariser', attempts=1, first_wait=0.01)
        chains = dataclasses.replace(CHAINS, summariser=summariser, replay=0, decoding=dataclasses.replace(DECODING, tries=1))
        with pytest.raises(EndpointError, match=r'20 chains in a row failed: .*503'):
            train(chained(policy, steps=40, chains=chains, save_every=100), tmp_path)
    steps = [row['step'] for row in rows_of(tmp_path)]
    assert len(steps) > 3
    assert (tmp_path / 'checkpoints' / str(steps[-1]) / 'manifest.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('count', [13, 27, 41])
def test_a_step_that_failed_is_begun_again_exactly(policy, tmp_path, count):  # noqa: F811
    """What its chains had stored is forgotten with it."""
    few = tmp_path / 'problems.jsonl'  # so that each comes up in every step
    few.write_text(''.join((policy / 'problems.jsonl').read_text().splitlines(keepends=True)[:4]))
    cfg = chained(policy, train=Source(str(few)), save_every=10)
    whole = train(cfg, tmp_path / 'whole')
    with pytest.raises(EndpointError, match='gone'):
        train(cfg, tmp_path / 'cut', DiesLater(count, EndpointError('gone')))
    assert_equal(train(cfg, tmp_path / 'cut'), whole)
    assert rows_of(tmp_path / 'whole', 'samples') == rows_of(tmp_path / 'cut', 'samples')


def test_a_draw_that_was_under_way_is_made_whatever_its_problem_has_earned_since(policy):  # noqa: F811
    cfg = chained(policy, chains=dataclasses.replace(CHAINS, least=0.5, most=0.9))
    problems = [Problem((1,), {'problem': f'{i} a+4'}) for i in range(8)]
    chains = Chains(cfg.chains, None, tiny_tokenizer('none'), (), 0, problems)
    for number in range(8):
        chains.difficulty.update(number, 0.0)
    collector = Collector(cfg, None, None, problems, chains, draw=6, pending=(3, 1))
    assert [collector._next()[1] for _ in range(2)] == [1, 3]
    assert collector._next()[1] > 6  # of new draws some are passed over


def test_sampling_for_a_step_ends_though_a_draw_brings_several_groups(policy, monkeypatch):  # noqa: F811
    """Ten times the groups of a step, counted by three."""
    chains = Chains(dataclasses.replace(CHAINS, states=3), None, tiny_tokenizer('none'), (), 0, [Problem((1,), {'problem': '3 a+4'})])
    drawn = []

    async def states(number, draw):
        drawn.append(draw)
        assert len(drawn) < 100
        return [Problem((1,), {'problem': '3 a+4'}, turn) for turn in range(3)]

    async def ungraded(problem, draw):
        return Group(draw, '3 a+4', ())

    monkeypatch.setattr(chains, 'states', states)
    cfg = chained(policy, chains=chains.cfg, groups=1, max_lag=1, in_flight=1)
    actor = types.SimpleNamespace(group=ungraded)
    with pytest.raises(RuntimeError, match='none could be trained'):
        asyncio.run(Collector(cfg, None, actor, [Problem((1,), {'problem': '3 a+4'})], chains).collect(0))


def test_solved_problems_are_passed_over(policy, tmp_path):  # noqa: F811
    class Easy(Vowels):
        async def grade(self, row, answer):
            grade = await super().grade(row, answer)
            return dataclasses.replace(grade, score=7) if row['problem'].startswith('0') else grade

    train(chained(policy, steps=7, groups=8, chains=dataclasses.replace(CHAINS, most=0.9)), tmp_path, Easy())
    solved = [row['problem'].startswith('0') for row in rows_of(tmp_path, 'samples')]
    assert sum(solved[: 4 * 24]) == 4 * 2 * 3  # the first epoch of 16 problems: 4 steps of 4 problems, 2 states, 3 answers
    assert not any(solved[4 * 24 :])


@pytest.mark.parametrize(('changes', 'message'), [
    ({'replay': -1}, 'replay'), ({'decoding': dataclasses.replace(DECODING, stop_on_repeat=True)}, 'fixed number of turns'),
    ({'decoding': dataclasses.replace(DECODING, mode='append')}, 'grow without bound'),
    ({'decoding': dataclasses.replace(DECODING, turns=0)}, 'turns must be at least 1'),
    ({'summariser': RemoteConfig('ftp://x', 'm')}, 'base_url')])
def test_chains_that_cannot_be_trained_from_are_refused(policy, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        validate(chained(policy, chains=dataclasses.replace(CHAINS, **changes)))


def test_a_problem_is_put_in_one_way_alone(policy):  # noqa: F811
    with pytest.raises(ValueError, match=r'leave problems\.prompt and problems\.thinking alone'):
        validate(chained(policy, problems=ProblemsConfig(prompt='Prove: {problem}', max_prompt=24)))


def test_a_state_that_does_not_fit_a_row_is_refused_at_once(policy, tmp_path):  # noqa: F811
    decoding = dataclasses.replace(DECODING, summarise=PhaseConfig(80))
    with pytest.raises(ValueError, match='do not fit row_length=96'):
        train(chained(policy, chains=dataclasses.replace(CHAINS, decoding=decoding)), tmp_path)
    assert not (tmp_path / 'checkpoints').exists()
