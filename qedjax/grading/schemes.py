"""Marking schemes as data sets have them, as the text that a judge is shown: whole texts, or lists of items worth points."""

from collections.abc import Mapping, Sequence
from typing import Any

from qedjax.grading.grade import FULL

POINTS = ('points', 'max_points')
DESCRIPTIONS = ('desc', 'description', 'grading_scheme_desc')


def scheme_text(scheme: Any) -> str:
    """The text of a scheme: a text as it stands; a list of {title, points, desc} as headings with their points.

    Raises ValueError for a scheme that is missing or empty, for an item without text or points, and for points that do not come to 7.
    """
    if isinstance(scheme, str) and scheme.strip():
        return scheme.strip()
    if not isinstance(scheme, Sequence) or isinstance(scheme, str) or not scheme:
        raise ValueError('the problem has no marking scheme (column rubric: a text, or a list of {title, points, desc})')
    items = [_item(number, item) for number, item in enumerate(scheme, 1)]
    if (total := sum(points for points, _ in items)) != FULL:
        raise ValueError(f'the items of the marking scheme are worth {total} points in all; they must sum to {FULL}')
    return '\n\n'.join(text for _, text in items)


def _item(number: int, item: Any) -> tuple[int, str]:
    if not isinstance(item, Mapping):
        raise ValueError(f'item {number} of the marking scheme is {type(item).__name__}, not a mapping with title, points and desc')
    points = next((item[name] for name in POINTS if item.get(name) is not None), None)
    text = next((item[name] for name in DESCRIPTIONS if item.get(name)), '')
    if isinstance(points, bool) or not isinstance(points, (int, float)) or points != int(points) or points < 0:
        raise ValueError(f'item {number} of the marking scheme is worth {points!r}; points must be whole numbers')
    title = str(item.get('title') or f'Item {number}').strip()
    if not str(text).strip() and not item.get('title'):
        raise ValueError(f'item {number} of the marking scheme has neither title nor desc')
    return int(points), f'## {title} ({int(points)} {"point" if points == 1 else "points"})\n\n{str(text).strip()}'.strip()
