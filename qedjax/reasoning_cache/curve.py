"""Score against turns: what a model makes of more compute at test time."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qedjax.reasoning_cache.state import Trace


@dataclasses.dataclass(frozen=True)
class Point:
    """All chains stopped after so many turns: mean score, half a 95% interval over chains, mean ids sampled, share without an answer."""

    turns: int
    mean: float
    interval: float
    tokens: float
    unanswered: float


def after(trace: Trace, turns: int) -> tuple[str, int]:
    """The answer that a chain stopped after so many turns gives, '' if it has none, and the ids that it sampled until then."""
    given = [answer for answer in trace.answers[:turns] if answer.strip()]
    # The summary after the last turn is not needed for its answer.
    calls = trace.calls[: 2 * turns - 1]
    return (given[-1] if given else ''), sum(len(call.completion.ids) for call in calls)


def curve(traces: Sequence[Trace], turns: Sequence[int], score: Callable[[str, str], float]) -> list[Point]:
    """Points at each number of turns, of the same chains; `score` gets (problem, answer)."""
    points = []
    for number in turns:
        stopped = [after(trace, number) for trace in traces]
        scores = [score(trace.start.problem, answer) for trace, (answer, _) in zip(traces, stopped, strict=True)]
        interval = 1.96 * np.std(scores, ddof=1) / np.sqrt(len(scores))
        points.append(Point(number, float(np.mean(scores)), float(interval), float(np.mean([tokens for _, tokens in stopped])),
                            float(np.mean([not answer for answer, _ in stopped]))))
    return points


def table(curves: Mapping[str, Sequence[Point]], full: float = 1.0) -> str:
    """The curves as text, a line for each model; scores are out of `full`."""
    turns = [point.turns for point in next(iter(curves.values()))]
    lines = [f'{"turns":<10}' + ''.join(f'{number:>16}' for number in turns)]
    for name, points in curves.items():
        lines.append(f'{name:<10}' + ''.join(f'{full * p.mean:>8.2f} +- {full * p.interval:.2f}' for p in points))
        lines.append(f'{"  tokens":<10}' + ''.join(f'{p.tokens:>16.0f}' for p in points))
    return '\n'.join(lines)


def plot(curves: Mapping[str, Sequence[Point]], path: str | os.PathLike, full: float = 1.0) -> None:
    """Writes the curves with their intervals as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and without pyplot no window is ever opened

    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name, points in curves.items():
        axes.errorbar([p.turns for p in points], [full * p.mean for p in points], [full * p.interval for p in points], marker='o',
                      capsize=3, label=name)
    axes.set(xscale='log', xlabel='turns', ylabel=f'mean score of {full:g}', ylim=(0, full))
    axes.set_xticks([p.turns for p in points], [str(p.turns) for p in points])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
