"""The turn loop: every chain of every problem is in flight at once through `complete()`, and nothing waits for another chain."""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from qedjax.llm.client import LanguageModel, RequestFailed, gather
from qedjax.reasoning_cache import prompts
from qedjax.reasoning_cache.prompts import PromptsConfig, reasoning_prompt, summary_prompt
from qedjax.reasoning_cache.state import MODES, REASON, Sampled, State, Trace, advance, readable, reasoning_part
from qedjax.rollout.requests import MIN_TEMPERATURE
from qedjax.types import FAULTS, Completion, SamplingParams


@dataclasses.dataclass(unsafe_hash=True)
class PhaseConfig:
    """How one phase is sampled: budget in tokens (H_R or H_S), temperature, top_p, top_k."""

    max_tokens: int = 16_384
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class RCConfig:
    """One chain. The defaults are those of QED-Nano (arXiv 2604.04898) at test time.

    Attributes:
      turns: of reasoning at most.
      reason, summarise: how the two phases are sampled.
      mode: 'replace' the summary each turn, or 'append' to it.
      total_tokens: no call is begun once so many were sampled; 0 is no bound. Remote endpoints do not tell what they sampled.
      stop_on_repeat: end when a turn gives the answer of the turn before.
      tries: of a call whose request fails.
      prompts: see there.
    """

    turns: int = 16
    reason: PhaseConfig = dataclasses.field(default_factory=PhaseConfig)
    summarise: PhaseConfig = dataclasses.field(default_factory=lambda: PhaseConfig(2048, 0.7, 0.8, 20))
    mode: str = 'replace'
    total_tokens: int = 0
    stop_on_repeat: bool = False
    tries: int = 2
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)


def validate(cfg: RCConfig) -> None:
    """Raises ValueError, in one sentence, for chains that cannot be decoded."""
    prompts.validate(cfg.prompts)
    if cfg.mode not in MODES:
        raise ValueError(f'mode is {cfg.mode!r}; choose one of {", ".join(MODES)}')
    for name, least in (('turns', 1), ('tries', 1), ('total_tokens', 0)):
        if getattr(cfg, name) < least:
            raise ValueError(f'{name} must be at least {least}, not {getattr(cfg, name)}')
    for name in ('reason', 'summarise'):
        phase = getattr(cfg, name)
        if phase.max_tokens < 1 or not (phase.temperature == 0 or MIN_TEMPERATURE <= phase.temperature < math.inf):
            raise ValueError(f'{name} needs max_tokens of at least 1 and temperature 0 or >= {MIN_TEMPERATURE}: {phase}')


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model with what it takes to write its prompts: no tokenizer where it is remote; the ids that end its answers."""

    model: LanguageModel
    tokenizer: Any = None
    stops: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Carries chains on.

    Raises ValueError for a bound on tokens that could not be counted.

    Attributes:
      cfg: of every chain.
      reasoner, summariser: who writes the two phases; often the same.
      check: asked with (problem, answer) whether an answer will do, which ends the chain; None never asks.
      committed: told each chain after each call, before the next begins: what a file must hold for a later `run` to go on from.
    """

    cfg: RCConfig
    reasoner: Writer
    summariser: Writer
    check: Callable[[str, str], Awaitable[bool]] | None = None
    committed: Callable[[Any, Trace], None] = lambda key, trace: None

    def __post_init__(self):
        if self.cfg.total_tokens and None in (self.reasoner.tokenizer, self.summariser.tokenizer):
            raise ValueError(f'total_tokens={self.cfg.total_tokens} cannot be counted at a remote endpoint; set it to 0')

    async def run(self, trace: Trace, seed: int, key: Any = None, last_summary: bool = False) -> Trace:
        """The chain carried to its end. `trace` is a new one (state.begin) or one that was interrupted.

        Seeds depend on (seed, turn, phase) alone, so a chain that goes on is the one that was never interrupted; our engine's log-probs,
        and so in principle a draw, depend on the rows beside it by rounding. A request that is refused, or fails `tries` times, ends its
        own chain as 'failed: ...'; run again, it goes on with that very call. The last turn is summarised only if `last_summary` says so.
        Raises EndpointError when nothing can be served.
        """
        trace = dataclasses.replace(trace, end='')
        while not trace.end:
            trace = await self.step(trace, seed, key, last_summary)
        return trace

    async def step(self, trace: Trace, seed: int, key: Any = None, last_summary: bool = False) -> Trace:
        """The chain after one more call, or ended, as `run` does it."""
        if end := await self._end(trace, last_summary):
            return dataclasses.replace(trace, end=end)
        try:
            completion = await self._call(trace, seed)
        except RequestFailed as error:
            return dataclasses.replace(trace, end=f'failed: {error}')
        trace = self.advance(trace, completion)
        self.committed(key, trace)
        return trace

    def advance(self, trace: Trace, completion: Completion) -> Trace:
        """The chain after its next call; also how one that was interrupted is rebuilt from its completions."""
        writer = self.reasoner if trace.due == REASON else self.summariser
        return advance(trace, completion, writer.tokenizer, self.reasoner.tokenizer, self.cfg.summarise.max_tokens, self.cfg.mode)

    async def _end(self, trace: Trace, last_summary: bool) -> str:
        """Why the chain ends here; '' if it goes on."""
        turns = len(trace.answers)
        if turns == self.cfg.turns and (trace.due == REASON or not last_summary):
            return 'turns'
        if self.cfg.total_tokens and trace.tokens >= self.cfg.total_tokens:
            return 'tokens'
        if trace.due == REASON or not trace.answers[-1].strip():
            return ''
        if self.cfg.stop_on_repeat and turns > 1 and trace.answers[-1].strip() == trace.answers[-2].strip():
            return 'repeated'
        return 'checked' if self.check and await self.check(trace.start.problem, trace.answers[-1]) else ''

    def _told(self, part: Sampled, phase: PhaseConfig) -> Sampled:
        """What the reasoner wrote or read, as the summariser is told it."""
        return readable(part, self.reasoner.tokenizer, self.summariser.tokenizer, phase.max_tokens)

    async def _call(self, trace: Trace, seed: int) -> Completion:
        """The next completion of a chain, tried again where its request fails."""
        state, phase, wrong = trace.states[-1], trace.due, ''
        if phase == REASON:
            writer, sampling = self.reasoner, self.cfg.reason
            prompt = reasoning_prompt(self.cfg.prompts, state, writer.tokenizer)
        else:
            writer, sampling = self.summariser, self.cfg.summarise
            reasoning = reasoning_part(trace.calls[-1].completion, self.reasoner.tokenizer, self.cfg.reason.max_tokens)
            summary = tuple(self._told(part, self.cfg.summarise) for part in state.summary)
            prompt = summary_prompt(self.cfg.prompts, dataclasses.replace(state, summary=summary), self._told(reasoning, self.cfg.reason),
                                    writer.tokenizer)
        params = call_params(sampling, call_seed(seed, state.turn, phase), writer.stops)
        for _ in range(self.cfg.tries):
            try:
                completion = await writer.model.complete(prompt, params)
            except RequestFailed as error:
                wrong = str(error)
            except ValueError as error:  # refused: it would be again
                raise RequestFailed(str(error)) from error
            else:
                if completion.finish_reason not in FAULTS:
                    return completion
                wrong = f'the sampler ended it: {completion.finish_reason}'
        raise RequestFailed(wrong)


def call_params(phase: PhaseConfig, seed: int, stops: tuple[int, ...]) -> SamplingParams:
    """How a call of a phase is sampled."""
    return SamplingParams(phase.temperature, phase.max_tokens, seed, stops, top_p=phase.top_p, top_k=phase.top_k)


def call_seed(seed: int, turn: int, phase: str) -> int:
    """Seed of one call of a chain."""
    return int(np.random.SeedSequence((seed, turn, phase == REASON)).generate_state(1)[0])


async def decode(decoder: Decoder, chains: list[tuple[Any, Trace, int]]) -> list[Trace]:
    """Carries (key, trace, seed) chains to their ends, all at once; the first error that is not one chain's own ends them all."""
    return list(await gather(*(decoder.run(trace, seed, key) for key, trace, seed in chains)))


def longest_requests(cfg: RCConfig, problem: str, tokenizer: Any, stops: tuple[int, ...]) -> list[tuple[Sequence[int], SamplingParams]]:
    """The longest prompts that one model may be asked in a chain that begins empty, and how: what cannot be served is known beforehand.

    Their sampled parts are filler. Both phases are that model's; none is summarised where there is one turn alone.
    """
    count = cfg.turns - 1 if cfg.mode == 'append' else min(cfg.turns - 1, 1)
    full = State(problem, (Sampled('summary', (0,) * cfg.summarise.max_tokens),) * count)
    reasoning = Sampled('reasoning', (0,) * cfg.reason.max_tokens)
    reason, summarise = (call_params(phase, 0, stops) for phase in (cfg.reason, cfg.summarise))
    requests: list[Any] = [(reasoning_prompt(cfg.prompts, state, tokenizer), reason) for state in (State(problem), full)]
    return requests + [(summary_prompt(cfg.prompts, full, reasoning, tokenizer), summarise)] * (cfg.turns > 1)
