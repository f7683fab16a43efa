"""Graded groups to packed rows: which answers are trained, with what advantage and weight, and where each number lies."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from qedjax.data.packing import assemble, plan_rows
from qedjax.rl.advantages import group_advantages, overlong_penalty
from qedjax.rl.losses import ObjectiveConfig
from qedjax.types import Group, RLBatch, Rollout


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer as it is trained: prompt and sampled ids, log-probs of the latter, advantage, and loss weight of each sampled id.

    Raises ValueError unless every id has a log-prob: an id that was not sampled has none and may not be trained.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    weight: float

    def __post_init__(self):
        if len(self.ids) != len(self.logprobs) or not self.prompt:
            raise ValueError(f'an answer has {len(self.ids)} ids, {len(self.logprobs)} log-probs and a prompt of {len(self.prompt)} ids; '
                             'every id needs the log-prob that it was sampled with, and something before it')

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


def shaped_rewards(group: Group, cfg: ObjectiveConfig, max_tokens: int) -> list[float | None]:
    """Rewards of a group's answers, with the penalty for long ones where the objective has it; None where there is no grade."""
    def shaped(rollout: Rollout) -> float | None:
        if rollout.reward is None or cfg.overlong != 'shaped':
            return rollout.reward
        return rollout.reward + overlong_penalty(len(rollout.completion.ids), max_tokens, cfg.overlong_buffer)

    return [shaped(rollout) for rollout in group.rollouts]


def varied(group: Group, cfg: ObjectiveConfig, max_tokens: int) -> bool:
    """Whether the rewards of a group differ: only then has it something to say about its answers."""
    rewards = {reward for reward in shaped_rewards(group, cfg, max_tokens) if reward is not None}
    return len(rewards) > 1


def make_samples(groups: Sequence[Group], cfg: ObjectiveConfig, max_tokens: int) -> list[Sample]:
    """The answers to train, in order. Left out: ungraded ones, groups with fewer than two graded, and cut ones if the objective says so.

    Weights come to the whole normaliser, computed over all graded answers of these groups, also those with weight 0.
    """
    graded = []
    for group in groups:
        if cfg.zero_variance == 'drop' and not varied(group, cfg, max_tokens):
            continue
        advantages = group_advantages(shaped_rewards(group, cfg, max_tokens), cfg.advantage)
        if advantages is not None:
            graded.append([(r, float(a)) for r, a in zip(group.rollouts, advantages, strict=True) if not np.isnan(a)])
    lengths = [[len(rollout.completion.ids) for rollout, _ in group] for group in graded]
    weights = token_weights(lengths, cfg.normaliser, max_tokens)
    return [Sample(r.completion.prompt_ids, r.completion.ids, r.completion.logprobs, advantage, weight)
            for group, group_weights in zip(graded, weights, strict=True)
            for (r, advantage), weight in zip(group, group_weights, strict=True)
            if r.completion.ids and not (cfg.overlong == 'mask' and r.completion.finish_reason == 'length')]


def token_weights(lengths: Sequence[Sequence[int]], normaliser: str, max_tokens: int) -> list[list[float]]:
    """Loss weight of each token of each answer, from the lengths of the answers of each group; N is the number of all answers.

    'samples': 1 / N, so that long answers weigh more (the reference). 'tokens': 1 / all tokens (DAPO, arXiv 2503.14476). 'sequences':
    1 / (N x tokens of the answer) (GRPO, arXiv 2402.03300). 'constant': 1 / (N x max_tokens) (Dr. GRPO, arXiv 2503.20783). 'group':
    1 / (N x mean tokens of the group's answers); the reference has the same without N.
    """
    answers, tokens = sum(map(len, lengths)), sum(map(sum, lengths))

    def weight(length: int, group: Sequence[int]) -> float:
        return 1 / max({'samples': answers, 'tokens': tokens, 'sequences': answers * length, 'constant': answers * max_tokens,
                        'group': answers * sum(group) / len(group)}[normaliser], 1)

    return [[weight(length, group) for length in group] for group in lengths]


def pack(samples: Sequence[Sample], row_length: int, rows: int, max_documents: int | None = None) -> list[RLBatch]:
    """Micro-batches [rows, row_length] that hold all samples, host arrays; the last is filled up with empty rows.

    Raises ValueError for a sample that no row holds: the limits of a run are checked before it starts, so this is a fault of the caller.
    """
    if longest := max((len(sample) for sample in samples if len(sample) > row_length), default=0):
        raise ValueError(f'an answer with its prompt has {longest} tokens, but a row holds {row_length}; raise row_length')
    plan = plan_rows([len(sample) for sample in samples], row_length, 0, max_documents) if samples else []
    filled = [_row([samples[i] for i in row], row_length) for row in plan]
    filled += [_row([], row_length)] * (-len(filled) % rows)
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *filled[i : i + rows]) for i in range(0, len(filled), rows)]


def _row(samples: Sequence[Sample], row_length: int) -> RLBatch:
    """One row [T]: what is told of an id lies where it is predicted, one before its own place."""
    base = assemble([(np.array(s.prompt + s.ids, np.int32), len(s.prompt)) for s in samples], row_length)
    advantages, logprobs = np.zeros(row_length, np.float32), np.zeros(row_length, np.float32)
    weights, start = np.zeros(row_length, np.float32), 0
    for sample in samples:
        first = start + len(sample.prompt) - 1
        seen = slice(first, first + len(sample.ids))
        advantages[seen], logprobs[seen], weights[seen] = sample.advantage, sample.logprobs, sample.weight
        start += len(sample)
    return RLBatch(base.tokens, base.targets, weights, base.positions, base.segment_ids, advantages, logprobs, logprobs)  # type: ignore[arg-type]
