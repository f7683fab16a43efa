"""The mark in a judge's report: its last score tag, at its end, and nothing else.

The rule: the last tag decides, even if an earlier one differs; it must hold a whole number of the scale, or that number out of 7; and
nothing but closing marks may follow it. Anything else is no mark. Nothing is clamped or guessed. Judges are shown answers `neutralised`,
so whatever they quote of one holds no tag.
"""

import html
import re

from qedjax.grading.grade import FULL

SCALES = {'0-7': tuple(range(FULL + 1)), '0167': (0, 1, 6, 7)}
_OPEN = re.compile(r'<\s*score\b', re.IGNORECASE)
_ESCAPED = re.compile(r'&(?:lt|#0*60|#x0*3c);', re.IGNORECASE)
_TAG = re.compile(r'<score>\s*([0-9]{1,2})(?:\s*/\s*([0-9]{1,2}))?\s*</score>[\s`*.$]*', re.IGNORECASE)
# The opening of what may speak to a judge or to a chat template: a tag of these names, or a control token.
_CONTROL = re.compile(r'(?:<|&(?:lt|#0*60|#x0*3c);)(?=\s*/?\s*(?:score|think|proof|answer|system|user|assistant)\b|\|[a-z_]{2,64}\|)',
                      re.IGNORECASE)


def parse_score(report: str, scale: str = '0-7') -> int | str:
    """The mark that a report (what the judge wrote, after its thinking) gives, or the reason why it gives none.

    `scale` is '0-7' or '0167'. A report whose tags are all escaped as in XML is read as if they were not.
    """
    if not _OPEN.search(report) and _ESCAPED.search(report):
        report = html.unescape(report)
    starts = [match.start() for match in _OPEN.finditer(report)]
    if not starts:
        return 'the report has no score tag'
    tag = _TAG.fullmatch(report[starts[-1] :])
    if not tag:
        return f'the report does not end with a mark: {report[starts[-1] :][:60]!r}'
    score, full = int(tag[1]), int(tag[2] or FULL)
    if full != FULL or score not in SCALES[scale]:
        return f'the mark {tag[0].strip()[:40]!r} is not of the scale {scale}'
    return score


def planted(answer: str) -> bool:
    """Whether an answer holds tags or control tokens that speak to a judge."""
    return bool(_CONTROL.search(answer))


def neutralised(answer: str) -> str:
    """The answer with such tags opened by a square bracket, which makes them plain text."""
    return _CONTROL.sub('[', answer)
