"""From problems to graded groups: each answer goes to the grader as soon as it is whole, while others are still being written."""

import dataclasses
from typing import Any

import numpy as np

from qedjax.data.chat import thought_of
from qedjax.grading.grade import Graded
from qedjax.grading.grader import Grader
from qedjax.llm.client import LanguageModel, gather
from qedjax.rl.problems import Problem
from qedjax.types import FAULTS, Group, Rollout, SamplingParams


@dataclasses.dataclass(frozen=True)
class Actor:
    """Samples and grades groups.

    Attributes:
      model: the endpoint that answers.
      grader: of the answers.
      tokenizer: of the model.
      params: of every sample; seed and sample index are set here.
      size: answers a group.
      seed: of the run.
    """

    model: LanguageModel
    grader: Grader
    tokenizer: Any
    params: SamplingParams
    size: int
    seed: int

    async def group(self, problem: Problem, draw: int) -> Group:
        """All answers to one problem, graded. Seeds depend on (run seed, draw, turn of a state, index of the answer) alone."""
        key = (self.seed, draw) if problem.turn is None else (self.seed, draw, problem.turn)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        params = [dataclasses.replace(self.params, seed=seed, sample=i) for i in range(self.size)]
        rollouts = await gather(*(self.rollout(problem, p) for p in params))
        return Group(draw, problem.row['problem'], tuple(rollouts), problem.turn, problem.summary)

    async def rollout(self, problem: Problem, params: SamplingParams) -> Rollout:
        """One answer. What was never said is worth 0 and costs no call; what was interrupted is not graded."""
        completion = await self.model.complete(problem.prompt_ids, params)
        answer = thought_of(self.tokenizer, completion).answer
        if completion.finish_reason in FAULTS:
            return Rollout(completion, answer, None, f'the sampler ended it: {completion.finish_reason}')
        if not answer.strip():
            return Rollout(completion, '', 0.0, 'no answer')
        grade = await self.grader.grade(problem.row, answer)
        if isinstance(grade, Graded):
            return Rollout(completion, answer, grade.reward, grade.feedback)
        return Rollout(completion, answer, None, grade.reason)
