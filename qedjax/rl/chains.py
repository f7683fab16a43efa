"""RL with the reasoning cache: a drawn problem becomes a chain of turns, and some of the chain's states become prompts of their own.

Only answers to those prompts are trained, graded against the problem itself; what the chain wrote is not. Chains and groups share the
engine, and a chain's summaries are kept for later chains where replay is on.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qedjax.llm import remote
from qedjax.llm.client import EndpointError, gather
from qedjax.llm.local import LocalEndpoint
from qedjax.llm.remote import RemoteConfig, RemoteEndpoint
from qedjax.processes import Crew
from qedjax.reasoning_cache import decoder
from qedjax.reasoning_cache.decoder import Decoder, RCConfig, Writer
from qedjax.reasoning_cache.prompts import reasoning_prompt
from qedjax.reasoning_cache.state import SUMMARISE, State, Trace, begin
from qedjax.reasoning_cache.states import Difficulty, ReplayBuffer, Stored, sample_states
from qedjax.rl.problems import Problem
from qedjax.rl.together import all_at_once

News = list[tuple[str, tuple[Any, ...]]]  # what happened to what chains know: see _learn
BREAKER = 20  # chains in a row that fail before the run stops


@dataclasses.dataclass(unsafe_hash=True)
class ChainsConfig:
    """States to train from.

    Attributes:
      states: of a drawn problem that are trained, chosen among those before each turn; 0 is RL without the reasoning cache.
      decoding: of the chains; its `turns` is the number of states to choose from, less where a chain begins in the buffer.
      replay: problems whose summaries are kept to begin later chains with; 0 keeps none.
      horizon: turn from which summaries are not kept any more; 0 is no bound.
      least, most: problems whose running mean reward lies outside (least, most] are mostly passed over.
      summariser: endpoint that summarises; without base_url the policy does. It is sent decoding.summarise.top_k unless that is 0, and
        some servers refuse it.
    """

    states: int = 0
    decoding: RCConfig = dataclasses.field(default_factory=lambda: RCConfig(turns=3))
    replay: int = 0
    horizon: int = 0
    least: float = -1.0
    most: float = 1.0
    summariser: RemoteConfig = dataclasses.field(default_factory=RemoteConfig)


def validate(cfg: ChainsConfig) -> None:
    """Raises ValueError, in one sentence, for chains that cannot be trained from."""
    if cfg.states < 0 or cfg.replay < 0 or cfg.horizon < 0 or not cfg.least < cfg.most:
        raise ValueError(f'chains needs states, replay and horizon >= 0, and least < most: {cfg}')
    if not cfg.states:
        return
    decoder.validate(cfg.decoding)
    if cfg.decoding.total_tokens or cfg.decoding.stop_on_repeat:
        raise ValueError('chains that are trained from have a fixed number of turns; leave total_tokens and stop_on_repeat off')
    if cfg.decoding.mode == 'append' and cfg.replay:
        raise ValueError("with replay, summaries of mode 'append' would grow without bound; set chains.decoding.mode=replace")
    if cfg.summariser.base_url:
        remote.validate(cfg.summariser)


def longest(cfg: ChainsConfig, problem: str, tokenizer: Any) -> tuple[int, int]:
    """Tokens of the longest prompt that a turn on this problem may reason from, and may be summarised from."""
    decoding = dataclasses.replace(cfg.decoding, turns=max(cfg.decoding.turns, 2))  # a chain of one turn may begin with a stored summary
    _, reason, summarise = (len(prompt) for prompt, _ in decoder.longest_requests(decoding, problem, tokenizer, ()))
    return reason, summarise


class Chains:
    """Turns draws of problems into prompts of states.

    In flight, what earlier chains left is known at once to the process that made them; to the others, and for good, once they `agree`: in
    one order, so that all know the same.

    Attributes:
      replay, difficulty: what earlier chains and their groups left.
      news: what has been added to it since `tell` was last called.
    """

    def __init__(self, cfg: ChainsConfig, endpoint: LocalEndpoint, tokenizer: Any, stops: tuple[int, ...], seed: int,
                 problems: Sequence[Problem], crew: Crew | None = None):
        self.cfg, self.failures = cfg, 0
        self.replay, self.difficulty, self.news = ReplayBuffer(cfg.replay, cfg.horizon), Difficulty(cfg.least, cfg.most), News()
        self._agreed, self._crew = _copies(self.replay, self.difficulty), crew or Crew()
        self._endpoint, self._problems, self._seed, self._tokenizer = endpoint, problems, seed, tokenizer
        self._remote = RemoteEndpoint(cfg.summariser) if cfg.summariser.base_url else None
        policy = Writer(endpoint, tokenizer, stops)
        # The summary after the last turn begins no state that is trained: it is written for the buffer alone.
        turns = cfg.decoding.turns - (not cfg.replay)
        self._decoder = Decoder(dataclasses.replace(cfg.decoding, turns=turns), policy, Writer(self._remote) if self._remote else policy)

    async def states(self, number: int, draw: int) -> list[Problem]:
        """The prompts of a draw of problem `number`."""
        start, seed = self._begin(number, draw)
        trace = begin(start.state)
        if self._decoder.cfg.turns:
            trace = await self._decoder.run(trace, seed, last_summary=True)
        return self._end(number, draw, start.version, trace)

    async def together(self, drawn: Sequence[tuple[int, int]]) -> list[list[Problem]]:
        """The same for several (number, draw), turn by turn, so that what the engine computes depends on nothing else."""
        begun = [self._begin(*pair) for pair in drawn]
        traces = await self._crew.divided(begun, self._decode)
        return [self._end(*pair, start.version, trace) for pair, (start, _), trace in zip(drawn, begun, traces, strict=True)]

    async def _decode(self, begun: Sequence[tuple[Stored, int]]) -> list[Trace]:
        """Chains that begin so, turn by turn."""
        traces = [begin(start.state) for start, _ in begun]
        for _ in range(2 * self._decoder.cfg.turns):
            going = [i for i, trace in enumerate(traces) if not trace.end]
            steps = [self._decoder.step(traces[i], begun[i][1], last_summary=True) for i in going]
            away = self._remote and any(traces[i].due == SUMMARISE for i in going)
            done = await (gather(*steps) if away else all_at_once(self._endpoint, steps, len(steps)))
            for i, trace in zip(going, done, strict=True):
                traces[i] = trace
        return traces

    def admit(self, number: int) -> bool:
        """Whether to train a problem that has come up: see Difficulty."""
        return self._learn('admit', number)

    def rewarded(self, number: int, reward: float) -> None:
        """Takes in the mean reward of a group."""
        self._learn('update', number, reward)

    def known(self) -> tuple[ReplayBuffer, Difficulty, News]:
        """Copies of what is known, which later chains do not change."""
        return *_copies(self.replay, self.difficulty), list(self.news)

    def forget(self, known: tuple[ReplayBuffer, Difficulty, News]) -> None:
        """Goes back to what was known before."""
        self.replay, self.difficulty, self.news = known

    def tell(self) -> News:
        """What the others do not know yet."""
        news, self.news = self.news, News()
        return news

    def agree(self, told: Sequence[News]) -> Mapping[str, Any]:
        """Takes in what all processes have told, this one among them; returns what is known now, as JSON can hold it.

        What this process learnt after it told is kept for the next time.
        """
        for name, values in itertools.chain(*told):
            _add(*self._agreed, name, values)
        self.replay, self.difficulty = _copies(*self._agreed)
        for name, values in self.tell():
            self._learn(name, *values)
        replay, difficulty = self._agreed
        return {'replay': replay.to_json(), 'difficulty': difficulty.to_json()}

    def load(self, row: Mapping[str, Any]) -> None:
        """Begins with what `agree` returned before a restart."""
        self.replay.load(row['replay'])
        self.difficulty.load(row['difficulty'])
        self._agreed = _copies(self.replay, self.difficulty)

    def _learn(self, name: str, *values: Any) -> Any:
        """'add' to the replay buffer, 'update' or 'admit' of the difficulties, with these arguments."""
        self.news.append((name, values))
        return _add(self.replay, self.difficulty, name, values)

    async def close(self) -> None:
        """Closes the connection to the summariser."""
        if self._remote:
            await self._remote.close()

    def _begin(self, number: int, draw: int) -> tuple[Stored, int]:
        """Where a chain begins, and its seed."""
        start = self.replay.start(number, self._problems[number].row['problem'], (self._seed, draw, 1))
        return start, int(np.random.SeedSequence((self._seed, draw, 2)).generate_state(1)[0])

    def _end(self, number: int, draw: int, version: int, trace: Trace) -> list[Problem]:
        """Stores the summaries of a chain, and makes prompts of some of its states; `version` wrote the summary that it began with."""
        self._heed(trace)
        found = []
        written = [call.completion for call in trace.calls if call.phase == SUMMARISE]
        for (before, state), completion in zip(itertools.pairwise(trace.states), written, strict=True):
            if state.summary is not before.summary:  # an empty summary leaves the old one, and the old one's version
                version = max((newest for newest, _ in completion.versions), default=0)
            found.append(Stored(state, version))
        if found:
            self._learn('add', number, found)
        chosen = sample_states(trace.states[: self.cfg.decoding.turns], self.cfg.states, (self._seed, draw, 3))
        return [self._prompt(number, state) for state in chosen]

    def _heed(self, trace: Trace) -> None:
        """Counts chains that failed. One does no harm: its states until then are trained; but a run must not go on without summaries."""
        failed = trace.end.startswith('failed')
        self.failures = self.failures + 1 if failed else 0
        if self.failures >= BREAKER:
            raise EndpointError(f'{self.failures} chains in a row {trace.end}; see to the summariser and start the run again: it goes on')

    def _prompt(self, number: int, state: State) -> Problem:
        ids = reasoning_prompt(self.cfg.decoding.prompts, state, self._tokenizer)
        summary = '\n\n'.join(part.text for part in state.summary)
        return Problem(tuple(ids), self._problems[number].row, state.turn, summary)  # type: ignore[arg-type]


def _copies(replay: ReplayBuffer, difficulty: Difficulty) -> tuple[ReplayBuffer, Difficulty]:
    return (dataclasses.replace(replay, stored=dict(replay.stored)),
            dataclasses.replace(difficulty, means=dict(difficulty.means), passed=dict(difficulty.passed)))


def _add(replay: ReplayBuffer, difficulty: Difficulty, name: str, values: tuple[Any, ...]) -> Any:
    methods: dict[str, Callable[..., Any]] = {'add': replay.add, 'update': difficulty.update, 'admit': difficulty.admit}
    return methods[name](*values)
