"""The problems of a run: read, checked against the grader and the prompt budget, filtered by difficulty, and drawn in a fixed order."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from qedjax.data.chat import prompt_ids
from qedjax.data.sources import Field, Source, read_rows

SCHEMA = (Field('problem'), Field('rubric', (str, list), required=False), Field('answer', required=False),
          Field('solution', required=False), Field('difficulty', (float, int), required=False))
ORDERS = ('shuffled', 'easiest first')


@dataclasses.dataclass(unsafe_hash=True)
class ProblemsConfig:
    """Which problems are trained on, and how they are put.

    Attributes:
      prompt: text around a problem, which it holds as {problem}; the problem alone by default.
      thinking: enable_thinking of the chat template, where it has that; None leaves its default.
      max_prompt: longest prompt in tokens; problems beyond it are left out and counted.
      least, most: problems are kept whose `difficulty` column (a success rate, such as reward_mean) lies above `least` and below or at
        `most`; those without one are kept while this is (-1, 1), which filters nothing.
      order: 'shuffled' anew each epoch, or 'easiest first' by that column in the first epoch, then shuffled.
    """

    prompt: str = '{problem}'
    thinking: bool | None = None
    max_prompt: int = 768
    least: float = -1.0
    most: float = 1.0
    order: str = 'shuffled'


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem as the model gets it (prompt_ids) and as the grader does (row: problem, rubric, answer, ...).

    With the reasoning cache, `turn` and `summary` tell the state that prompt_ids put; turn is None without.
    """

    prompt_ids: tuple[int, ...]
    row: Mapping[str, Any]
    turn: int | None = None
    summary: str = ''


def validate(cfg: ProblemsConfig) -> None:
    """Raises ValueError, in one sentence, for a setting that cannot work."""
    if cfg.prompt.count('{problem}') != 1:
        raise ValueError(f'problems.prompt={cfg.prompt[:60]!r} must hold {{problem}} once')
    if cfg.order not in ORDERS:
        raise ValueError(f'problems.order is {cfg.order!r}; choose one of {", ".join(ORDERS)}')
    if not cfg.least < cfg.most or cfg.max_prompt < 1:
        raise ValueError(f'problems.least={cfg.least} must be below most={cfg.most}, and max_prompt={cfg.max_prompt} positive')


def read_problems(source: Source, cfg: ProblemsConfig, tokenizer, check: Callable[[Mapping[str, Any]], None]) -> list[Problem]:
    """The problems of a source that pass the filters, in the order of the file.

    `check` is the grader's: it raises ValueError for a row that it could not grade. Such rows count as bad, of which there may be
    source.max_bad_share. Raises ValueError if there are more, or no problem is left.
    """
    rows, report = read_rows(source, SCHEMA)
    problems, dropped, bad = [], Counter[str](), []
    for number, row in enumerate(rows, 1):
        try:
            check(row)
            ids = prompt_ids(tokenizer, [{'role': 'user', 'content': cfg.prompt.replace('{problem}', row['problem'])}], cfg.thinking)
        except ValueError as error:
            bad.append(f'row {number}: {error}')
            continue
        if reason := _unfit(row, ids, cfg):
            dropped[reason] += 1
        else:
            problems.append(Problem(ids, row))
    logging.info('%s: %s; %d problems; left out: %s', source.path, report, len(problems), dict(dropped) or 'none')
    if len(bad) > source.max_bad_share * len(rows):
        raise ValueError(f'{source.path}: {len(bad)} of {len(rows)} rows cannot be graded, e.g. {"; ".join(bad[:3])}; mend them or raise '
                         f'max_bad_share={source.max_bad_share}')
    if not problems:
        raise ValueError(f'{source.path}: no problem is left ({dict(dropped)}); widen problems.least, most or max_prompt')
    return problems


def _unfit(row: Mapping[str, Any], ids: Sequence[int], cfg: ProblemsConfig) -> str | None:
    if len(ids) > cfg.max_prompt:
        return f'prompt longer than {cfg.max_prompt} tokens'
    if (cfg.least, cfg.most) == (-1.0, 1.0) or cfg.least < row.get('difficulty', -1.0) <= cfg.most:
        return None
    return 'too hard, too easy or of unknown difficulty'


def problem_number(draw: int, count: int, seed: int, difficulties: Sequence[float] | None = None) -> int:
    """Number of the problem that is drawn `draw`-th: every problem once an epoch, a pure function of its arguments.

    `difficulties` (success rates) put the first epoch in order, the easiest first.
    """
    epoch, index = divmod(draw, count)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    if difficulties is not None and epoch == 0:
        order = order[np.argsort(-np.asarray(difficulties)[order], kind='stable')]
    return int(order[index])
