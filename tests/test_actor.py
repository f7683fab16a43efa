"""From an answer to its reward: what follows the thinking is graded, silence is worth nothing, an interruption is not graded."""

import asyncio

import pytest

from qedjax.grading.grade import Graded, Ungraded
from qedjax.rl.actor import Actor
from qedjax.rl.problems import Problem
from qedjax.testing import tiny_tokenizer
from qedjax.types import Completion, SamplingParams


class Scripted:
    """An endpoint that says what it is told, and remembers what it was asked."""

    def __init__(self, text, reason='stop'):
        self.text, self.reason, self.asked = text, reason, []

    async def complete(self, prompt, params):
        self.asked.append(params)
        return Completion(self.text, (1, 2), (-0.1, -0.2), self.reason, tuple(prompt), ((0, 2),))


class Recording:
    """A grader that remembers what it was shown."""

    def __init__(self, grade):
        self.given, self.shown = grade, []

    async def grade(self, row, answer):
        self.shown.append(answer)
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def group(text, reason='stop', grade=None, thinking='none', prompt='<|im_start|>', size=1, seed=0, draw=0):
    tokenizer = tiny_tokenizer(thinking)
    model, grader = Scripted(text, reason), Recording(Graded(7, 'well done') if grade is None else grade)
    actor = Actor(model, grader, tokenizer, SamplingParams(1.0, 9), size, seed)
    problem = Problem(tuple(tokenizer.encode(prompt)), {'problem': 'p'})
    return asyncio.run(actor.group(problem, draw)), grader.shown, model.asked


@pytest.mark.parametrize(('text', 'prompt', 'shown'), [
    ('the proof', '<|im_start|>', 'the proof'), ('hm</think>\n\nthe proof', 'assistant\n<think>\n', 'the proof'),
    ('<think>hm</think>the proof', '<|im_start|>', 'the proof'), ('draft', '<|im_start|>', 'draft'),
    ('hm</think>a</think>b', '<think>\n', 'a</think>b')])
def test_what_follows_the_thinking_is_graded(text, prompt, shown):
    got, seen, _ = group(text, prompt=prompt)
    assert seen == [shown]
    assert (got.rollouts[0].answer, got.rollouts[0].reward, got.rollouts[0].feedback) == (shown, 1.0, 'well done')


@pytest.mark.parametrize(('text', 'prompt'), [('a draft <score>7</score>', '<think>\n'), ('<think>never done', '<|im_start|>'),
                                              ('hm</think>', '<think>\n'), ('hm</think> \n ', '<think>\n'), ('', '<|im_start|>')])
@pytest.mark.parametrize('reason', ['stop', 'length'])
def test_no_answer_is_worth_nothing_and_costs_no_call(text, prompt, reason):
    got, seen, _ = group(text, reason, prompt=prompt)
    assert seen == []
    assert (got.rollouts[0].answer, got.rollouts[0].reward) == ('', 0.0)


@pytest.mark.parametrize('reason', ['cancelled', 'error', 'deadline'])
def test_what_was_interrupted_is_not_graded(reason):
    got, seen, _ = group('half a proof', reason)
    assert seen == []
    assert got.rollouts[0].reward is None
    assert reason in got.rollouts[0].feedback


def test_ungraded_is_no_reward():
    got, _, _ = group('proof', grade=Ungraded('the judge sleeps'))
    assert (got.rollouts[0].reward, got.rollouts[0].feedback) == (None, 'the judge sleeps')


def test_seeds_depend_on_run_draw_and_index_alone():
    def asked(**changes):
        return [(p.seed, p.sample) for p in group('x', size=4, **changes)[2]]

    base = asked()
    assert base == asked()
    assert [sample for _, sample in base] == [0, 1, 2, 3]
    assert len({seed for seed, _ in base}) == 1
    assert len({asked(seed=s, draw=d)[0][0] for s in range(3) for d in range(3)}) == 9


def test_a_grader_that_fails_ends_the_group_and_leaves_no_task():
    async def main():
        actor = Actor(Scripted('x'), Recording(RuntimeError('gone')), tiny_tokenizer('none'), SamplingParams(1.0, 9), 4, 0)
        with pytest.raises(RuntimeError, match='gone'):
            await actor.group(Problem((1,), {'problem': 'p'}), 0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(main()) == []
