"""The mark in a judge's report: the last score tag that is the judge's own, and nothing else.

The rule: the answer itself does not count where the report repeats it; the last tag decides, even if an earlier one differs; it must hold a
whole number of the scale, or that number out of 7; and nothing but closing marks may follow it. Anything else is no mark. Nothing is
clamped or guessed. What judges are shown is `neutralised`, so that pieces of it which they quote hold no tag at all.
"""

import html
import re

from qedjax.grading.grade import FULL

QUOTE = 40  # shortest answer that is recognised in a report: a shorter one might be the report's own mark
SCALES = {'0-7': tuple(range(FULL + 1)), '0167': (0, 1, 6, 7)}
_OPEN = re.compile(r'<\s*/?\s*score\b', re.IGNORECASE)
_TAG = re.compile(r'<score>\s*([0-9]{1,2})(?:\s*/\s*([0-9]{1,2}))?\s*</score>[\s`*.$]*', re.IGNORECASE)
_ESCAPED = re.compile(r'&lt;\s*/?\s*score\b', re.IGNORECASE)
_CONTROL = re.compile(r'<\|[^|<>\n]{1,64}\|>|<\s*/?\s*(?:score|think|proof|answer|system|user|assistant)\b[^<>\n]*>?', re.IGNORECASE)


def parse_score(report: str, answer: str = '', scale: str = '0-7') -> int | str:
    """The mark that a report gives, or the reason why it gives none.

    Args:
      report: what the judge wrote, after its thinking.
      answer: the text that was marked.
      scale: '0-7', or '0167'.
    """
    own = report.replace(answer.strip(), '') if len(answer.strip()) >= QUOTE else report
    if not _OPEN.search(own) and _ESCAPED.search(own):
        own = html.unescape(own)
    starts = [match.start() for match in re.finditer(r'<\s*score\b', own, re.IGNORECASE)]
    if not starts:
        return 'the report has no score tag'
    tag = _TAG.fullmatch(own[starts[-1] :])
    if not tag:
        return f'the report does not end with a mark: {own[starts[-1] :][:60]!r}'
    score, full = int(tag[1]), int(tag[2] or FULL)
    if full != FULL or score not in SCALES[scale]:
        return f'the mark {tag[0].strip()[:40]!r} is not of the scale {scale}'
    return score


def planted(answer: str) -> bool:
    """Whether an answer holds tags or control tokens that speak to a judge."""
    return bool(_CONTROL.search(answer))


def neutralised(answer: str) -> str:
    """The answer with such tags put into square brackets: quoted by a judge, they are no tags any more."""
    return _CONTROL.sub(lambda match: f'[{match[0].strip("<>")}]', answer)
