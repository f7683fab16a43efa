"""The reasoning cache as values: what a chain knows, the calls it has made, and what follows from a call. Nothing here asks a model.

A turn reasons from (problem, summary), then summarises (problem, summary, reasoning); only the summary reaches the next turn. A chain is
its calls: its state is recomputed from them, so a call either happened whole or not at all, and a chain goes on where it stopped.
Source: the reasoning cache of QED-Nano (arXiv 2604.04898).
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qedjax.data.chat import as_text, chat_format, split_thinking, thought_of
from qedjax.types import Completion

REASON, SUMMARISE = 'reason', 'summarise'
MODES = ('replace', 'append')


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A text that a model wrote.

    Attributes:
      text: of it.
      ids: the very ids that were sampled. Where they are unknown, or some are control tokens, which no prompt may hold, those of the text
        spelled out, no more than the budget of what was sampled; None for a model without a tokenizer.
      cut: whether its budget ended it.
    """

    text: str = ''
    ids: tuple[int, ...] | None = ()
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    """What a chain knows before a turn: the problem, the summaries' parts (one, or in mode 'append' one a turn), the turn from 0."""

    problem: str
    summary: tuple[Sampled, ...] = ()
    turn: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """A completion in a chain. `phase` is 'reason' or 'summarise'."""

    phase: str
    turn: int
    completion: Completion


@dataclasses.dataclass(frozen=True)
class Trace:
    """A chain from its start.

    Attributes:
      start: state before the first call.
      calls: all of them, in order.
      states: before each turn that was begun, and the one after the last summary.
      answers: of each turn that was reasoned, in order; '' where its thinking was cut or nothing followed it.
      end: why it ended: 'turns', 'tokens', 'repeated', 'checked', or 'failed: ' and the reason; '' while it goes on.
    """

    start: State
    calls: tuple[Call, ...]
    states: tuple[State, ...]
    answers: tuple[str, ...]
    end: str = ''

    @property
    def answer(self) -> tuple[str, int | None]:
        """The answer of the last turn that gave one, and that turn's number; ('', None) if none did."""
        given = [(answer, self.start.turn + i) for i, answer in enumerate(self.answers) if answer.strip()]
        return given[-1] if given else ('', None)

    @property
    def tokens(self) -> int:
        """Ids that were sampled in all."""
        return sum(len(call.completion.ids) for call in self.calls)

    @property
    def due(self) -> str:
        """The phase of the next call."""
        return SUMMARISE if self.calls and self.calls[-1].phase == REASON else REASON


def begin(start: State) -> Trace:
    """A chain without calls."""
    return Trace(start, (), (start,), ())


def advance(trace: Trace, completion: Completion, writer: Any, reader: Any, most: int, mode: str = 'replace') -> Trace:
    """The chain after its next call returned `completion`.

    `writer` is the tokenizer of the model which wrote it, `reader` that of the model which reasons from summaries, None for a remote one;
    a summary has `most` ids at most. An empty summary leaves the old one as it is.
    """
    state, phase = trace.states[-1], trace.due
    calls = (*trace.calls, Call(phase, state.turn, completion))
    if phase == REASON:
        return dataclasses.replace(trace, calls=calls, answers=(*trace.answers, _thought(completion, writer).answer))
    new = readable(final_part(completion, writer, most), writer, reader, most)
    parts = state.summary if not new.text.strip() else (new,) if mode == 'replace' else (*state.summary, new)
    return dataclasses.replace(trace, calls=calls, states=(*trace.states, State(state.problem, parts, state.turn + 1)))


def reasoning_part(completion: Completion, tokenizer: Any, most: int) -> Sampled:
    """What a turn reasoned: the text before its thinking closes, or all of it where nothing closes or was opened. Of `most` ids at most."""
    thought = _thought(completion, tokenizer)
    text = thought.reasoning.strip('\n') or thought.answer.strip('\n')
    return _sampled(completion, text, completion.text.find(text), tokenizer, most)


def final_part(completion: Completion, tokenizer: Any, most: int) -> Sampled:
    """What follows the thinking of a completion: an answer, or a summary. Of `most` ids at most."""
    text = _thought(completion, tokenizer).answer.strip('\n')
    return _sampled(completion, text, completion.text.rfind(text), tokenizer, most)


def readable(part: Sampled, writer: Any, reader: Any, most: int) -> Sampled:
    """What a model wrote as another reads it, by their tokenizers: ids of one vocabulary mean nothing in another."""
    if writer is reader or not part.text:
        return part
    return dataclasses.replace(part, ids=None) if reader is None else spelled(part.text, reader, most, part.cut)


def _thought(completion: Completion, tokenizer: Any):
    return split_thinking(completion.text, opened=False) if tokenizer is None else thought_of(tokenizer, completion)


def _sampled(completion: Completion, text: str, start: int, tokenizer: Any, most: int) -> Sampled:
    """A part of a completion, from a character on, with its ids if some run of the completion's ids means exactly that text."""
    if not text:
        return Sampled()
    cut = completion.finish_reason == 'length'
    if tokenizer is None:
        return Sampled(text, None, cut)
    if not chat_format(tokenizer).control.search(text):
        first, last = (_within(completion.ids, length, tokenizer) for length in (start, start + len(text)))
        ids = tuple(completion.ids[first:last])
        if tokenizer.decode(ids) == text:
            return Sampled(text, ids, cut)
    return spelled(text, tokenizer, most, cut)


def spelled(text: str, tokenizer: Any, most: int, cut: bool = False) -> Sampled:
    """A text with at most so many ids of its own: for who was not told the sampled ones, or may not have them."""
    if len(ids := as_text(tokenizer, text)) <= most:
        return Sampled(text, tuple(ids), cut)
    # Not in the middle of a character, which has up to four bytes.
    kept = next((ids[:end] for end in range(most, most - 4, -1) if not tokenizer.decode(ids[:end]).endswith('\ufffd')), ids[:most])
    return Sampled(tokenizer.decode(kept), tuple(kept), cut=True)


def _within(ids: Sequence[int], length: int, tokenizer: Any) -> int:
    """The most first ids whose text is no longer: by bisection, since decoding 2,000 prefixes would take seconds."""
    return bisect.bisect_right(range(len(ids) + 1), length, key=lambda count: len(tokenizer.decode(ids[:count]))) - 1


def to_json(value: State | Call | Completion | Trace) -> dict[str, Any]:
    """Any of these values as JSON can hold it."""
    return dataclasses.asdict(value)


def state_from(row: Mapping[str, Any]) -> State:
    """Inverse of to_json for a state."""
    parts = tuple(Sampled(**{name: _tuples(value) for name, value in part.items()}) for part in row['summary'])
    return State(row['problem'], parts, row['turn'])


def completion_from(row: Mapping[str, Any]) -> Completion:
    """Inverse of to_json for a completion."""
    return Completion(**{name: _tuples(value) for name, value in row.items()})


def trace_from(row: Mapping[str, Any]) -> Trace:
    """Inverse of to_json for a chain."""
    calls = (Call(call['phase'], call['turn'], completion_from(call['completion'])) for call in row['calls'])
    return Trace(state_from(row['start']), tuple(calls), tuple(map(state_from, row['states'])), tuple(row['answers']), row['end'])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
