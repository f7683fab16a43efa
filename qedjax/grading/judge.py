"""The LLM judge: marks an answer by its rubric, keeps what was paid for, and stops the run rather than let it train on silence."""

import asyncio
import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diskcache

from qedjax import prompts
from qedjax.data.chat import split_thinking
from qedjax.grading.grade import Grade, Graded, Ungraded
from qedjax.grading.parser import neutralised, parse_score, planted
from qedjax.grading.schemes import scheme_text
from qedjax.llm.client import EndpointError, LanguageModel, RequestFailed, gather
from qedjax.llm.remote import RemoteConfig, Usage
from qedjax.metrics import drop_torn_row
from qedjax.types import SamplingParams

GRACE = 3.0  # seconds that questions under way are given when the judge is closed: what is about to come in is paid for
COMBINE: dict[str, Callable[[Sequence[int]], float]] = {'mean': statistics.fmean, 'median': statistics.median}


@dataclasses.dataclass(unsafe_hash=True)
class JudgeConfig:
    """The judge.

    Attributes:
      remote: the endpoint that it is.
      prompt: name of a file in qedjax/prompts; those whose name ends with 0167 have that scale.
      temperature, max_tokens: of its reports.
      samples: reports an answer; combine: 'mean' or 'median' of their marks.
      tries: reports at most for each of these, while they give no mark.
      longest: characters of the longest answer that is sent; longer ones are ungraded rather than cut.
      cache: folder of all reports that gave a mark; '' is grader_cache in the workdir.
      breaker: answers in a row that could not be graded, after which the run stops.
    """

    remote: RemoteConfig = dataclasses.field(default_factory=RemoteConfig)
    prompt: str = 'grade_rubric'
    temperature: float = 1.0
    max_tokens: int = 81_920
    samples: int = 1
    combine: str = 'mean'
    tries: int = 2
    longest: int = 200_000
    cache: str = ''
    breaker: int = 20


def validate(cfg: JudgeConfig) -> None:
    """Raises ValueError, in one sentence, for a judge that cannot work."""
    prompts.load(cfg.prompt)
    if cfg.combine not in COMBINE:
        raise ValueError(f'judge.combine is {cfg.combine!r}; choose one of {", ".join(COMBINE)}')
    for name in ('max_tokens', 'samples', 'tries', 'longest', 'breaker'):
        if getattr(cfg, name) < 1:
            raise ValueError(f'judge.{name} must be at least 1, not {getattr(cfg, name)}')
    if not 0 <= cfg.temperature < math.inf:
        raise ValueError(f'judge.temperature must be a number that is not negative, but is {cfg.temperature}')


class Judge:
    """A Grader that asks a language model.

    `counts` tells how many answers were graded, ungraded, found in the cache, and held text that speaks to a judge.
    """

    def __init__(self, cfg: JudgeConfig, model: LanguageModel, folder: str):
        """`folder` receives transcripts.jsonl, and the cache where the config names none."""
        validate(cfg)
        self.cfg, self._model = cfg, model
        self._scale = '0167' if cfg.prompt.endswith('0167') else '0-7'
        self._fields = prompts.fields(cfg.prompt) - {'fence', 'proof', 'problem', 'rubric'}
        self.counts = {'graded': 0, 'ungraded': 0, 'cached': 0, 'planted': 0}
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self._transcripts = pathlib.Path(folder) / 'transcripts.jsonl'
        drop_torn_row(self._transcripts)
        self._cache = diskcache.Cache(cfg.cache or str(pathlib.Path(folder) / 'grader_cache'), disk=diskcache.JSONDisk,
                                      eviction_policy='none')
        self._marking: dict[str, asyncio.Future[tuple[int | None, str]]] = {}
        self._in_a_row = 0

    def check(self, row: Mapping[str, Any]) -> None:
        """See Grader: a problem needs a marking scheme, and a solution where the prompt shows one."""
        scheme_text(row.get('rubric'))
        for name in self._fields:
            if not str(row.get(name) or '').strip():
                raise ValueError(f'the problem has no {name}, which the prompt {self.cfg.prompt} shows')

    async def grade(self, row: Mapping[str, Any], answer: str) -> Grade:
        """See Grader. Ungraded answers in a row trip the breaker: EndpointError."""
        self.counts['planted'] += planted(answer)
        if len(answer) > self.cfg.longest:  # a fact about the answer: it says nothing about the judge
            self.counts['ungraded'] += 1
            return Ungraded(f'the answer has {len(answer)} characters, more than the {self.cfg.longest} that are sent')
        messages = self._messages(row, answer)
        grade = self._combined(await gather(*(self._mark_once(messages, i) for i in range(self.cfg.samples))))
        graded = isinstance(grade, Graded)
        self.counts['graded' if graded else 'ungraded'] += 1
        self._in_a_row = 0 if graded else self._in_a_row + 1
        if self._in_a_row >= self.cfg.breaker:
            raise EndpointError(f'the judge could not grade {self._in_a_row} answers in a row, the last because {grade.reason}; '  # type: ignore[union-attr]
                                'see to it and start the run again: it goes on, and what was graded is not paid for again')
        return grade

    def report(self) -> dict[str, float]:
        """See Grader: counts of answers, and of calls, tokens and dollars if the model counts them."""
        return {**self.counts, **vars(getattr(self._model, 'usage', Usage()))}

    def remember(self, transcripts: str) -> None:
        """Takes the reports of another judge's transcripts for its own: what they answer is not asked again."""
        with open(transcripts, 'rb') as file:
            for row in (json.loads(line) for line in file if line.endswith(b'}\n')):  # a kill may have cut the last one
                if isinstance(row['score'], int):
                    self._cache.set(row['key'], row['report'])

    async def close(self) -> None:
        """See Grader. Questions under way have GRACE seconds to be answered."""
        if self._marking:
            await asyncio.wait(self._marking.values(), timeout=GRACE)
        for task in list(self._marking.values()):
            task.cancel()
        await asyncio.gather(*self._marking.values(), return_exceptions=True)
        self._cache.close()
        await self._model.close()

    def _combined(self, marks: Sequence[tuple[int | None, str]]) -> Grade:
        given = [mark for mark, _ in marks if mark is not None]
        if not given:
            return Ungraded(marks[0][1])
        return Graded(COMBINE[self.cfg.combine](given), '\n\n'.join(report for mark, report in marks if mark is not None))

    def _messages(self, row: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
        fence = '~~~~ ' + hashlib.sha256(f'{row["problem"]}\0{answer}'.encode()).hexdigest()[:16]  # no answer can hold its own hash
        values = {name: str(row.get(name) or '') for name in self._fields}
        text = prompts.render(self.cfg.prompt, problem=row['problem'], rubric=scheme_text(row.get('rubric')), proof=neutralised(answer),
                              fence=fence, **values)
        return [{'role': 'user', 'content': text}]

    async def _mark_once(self, messages: list[dict[str, str]], sample: int) -> tuple[int | None, str]:
        """As _mark; equal questions that are under way at a time are asked once."""
        key = self._key(messages, self._params(sample, 0))
        if key not in self._marking:
            self._marking[key] = asyncio.ensure_future(self._mark(messages, sample))
            self._marking[key].add_done_callback(lambda _: self._marking.pop(key, None))
        return await asyncio.shield(self._marking[key])

    async def _mark(self, messages: list[dict[str, str]], sample: int) -> tuple[int | None, str]:
        """One mark and its report, or None and why there is none. A mark that was once paid for is found before anything is asked."""
        asked = [(self._key(messages, params), params) for params in (self._params(sample, i) for i in range(self.cfg.tries))]
        for key, _ in asked:
            report = self._cache.get(key)
            if report is not None and isinstance(score := parse_score(report, self._scale), int):
                self.counts['cached'] += 1
                return score, report
        reason = ''
        for key, params in asked:
            try:
                report = await self._ask(messages, params)
            except (ValueError, RequestFailed) as error:  # the network's edge; EndpointError ends the run
                return None, str(error)
            score = parse_score(report, self._scale)
            self._write(key, messages, report, score)
            if isinstance(score, int):
                self._cache.set(key, report)
                return score, report
            reason = score
        return None, reason

    def _params(self, sample: int, attempt: int) -> SamplingParams:
        return SamplingParams(self.cfg.temperature, self.cfg.max_tokens, sample=sample * self.cfg.tries + attempt)

    async def _ask(self, messages, params: SamplingParams) -> str:
        """A report without the judge's thinking, which is no verdict."""
        return split_thinking((await self._model.complete(messages, params)).text, opened=False).answer

    def _key(self, messages, params: SamplingParams) -> str:
        """Hash of all that the report depends on; where the model is served is no part of it."""
        remote = self.cfg.remote
        asked = [remote.model, remote.api, remote.effort, messages, params.temperature, params.max_tokens, params.sample]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _write(self, key: str, messages, report: str, score: int | str) -> None:
        row = {'key': key, 'time': round(time.time(), 3), 'messages': messages, 'report': report, 'score': score}
        with self._transcripts.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row, ensure_ascii=False) + '\n')


