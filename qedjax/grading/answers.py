"""Final answers, checked by math-verify in a process that can be killed: a check that fails or hangs is not a wrong answer."""

import asyncio
import concurrent.futures
import decimal
import logging
import multiprocessing
import re
import threading
from collections.abc import Mapping
from typing import Any

from qedjax.grading.grade import FULL, Grade, Graded, Ungraded

TIMEOUT = 10.0  # seconds a check
STARTING = 120.0  # seconds in which the process must have imported its library
NUMBER = re.compile(r'[-+]?\$?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?')
_MARK = re.compile(r'answer\s+is:?|answer:|^####(?=\s*[-+$.0-9])', re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r'\.(?:\s|$)|\n')


def final_answer(text: str) -> str:
    """What an answer states: its last \\boxed{}, or the sentence after the last 'answer is', 'Answer:' or '####'; '' if nothing."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marks = list(_MARK.finditer(text))
    return _SENTENCE_END.split(text[marks[-1].end() :].strip())[0].strip() if marks else ''


def _last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces close; None if there is none. One pass: repetition must not be expensive."""
    found, opened = None, list[int]()
    for match in re.finditer(r'\\boxed\s*\{|[{}]', text):
        if match[0] != '}':
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0 and (found is None or start > found[0]):
            found = start, match.start()
    return None if found is None else text[slice(*found)].strip()


def plain_number(text: str) -> decimal.Decimal | None:
    """The value of a text that is one decimal number, with thousands separators or a dollar sign perhaps; else None. Exact."""
    text = text.strip().strip('$').strip()
    return decimal.Decimal(text.replace(',', '').replace('$', '')) if NUMBER.fullmatch(text) else None


class AnswerGrader:
    """Full marks for the right final answer, else none. Plain numbers are compared here, everything else by math-verify."""

    def __init__(self, timeout: float = TIMEOUT):
        self._checker = Checker(timeout)
        # Its own thread: checks that wait must not hold up whoever else needs one.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='answers')

    def check(self, row: Mapping[str, Any]) -> None:
        """See Grader."""
        if not str(row.get('answer') or '').strip():
            raise ValueError('the problem has no answer (column answer)')

    async def grade(self, row: Mapping[str, Any], answer: str) -> Grade:
        """See Grader."""
        stated, truth = final_answer(answer), str(row['answer']).strip()
        if not stated:
            return Graded(0, 'no final answer')
        numbers = plain_number(stated), plain_number(truth)
        if None in numbers:
            verdict = await asyncio.get_running_loop().run_in_executor(self._thread, self._checker.verify, truth, stated)
        else:
            verdict = numbers[0] == numbers[1]
        if isinstance(verdict, Ungraded):
            return verdict
        return Graded(FULL if verdict else 0, f'final answer {stated[:80]!r} is {"right" if verdict else "wrong"}')

    def report(self) -> dict[str, float]:
        """See Grader."""
        return {}

    async def close(self) -> None:
        """See Grader."""
        self._thread.shutdown(cancel_futures=True)
        self._checker.close()


class Checker:
    """math-verify in a process of its own, which is killed when a check takes more than `timeout` seconds, and started again."""

    def __init__(self, timeout: float = TIMEOUT):
        self._timeout, self._lock = timeout, threading.Lock()
        self._process: Any = None
        self._pipe: Any = None

    def verify(self, truth: str, stated: str) -> bool | Ungraded:
        """Its verdict, or why there is none. One check at a time; any thread may call."""
        with self._lock:
            if self._process is None or not self._process.is_alive():
                self._start()
            try:
                self._pipe.send((truth, stated))
                if self._pipe.poll(self._timeout):
                    verdict = self._pipe.recv()
                    return verdict if isinstance(verdict, bool) else Ungraded(f'the answer checker failed: {verdict}')
            except (EOFError, OSError):
                self.close()
                return Ungraded(f'the answer checker died on {stated[:80]!r}')
            self.close()
            return Ungraded(f'the answer checker took more than {self._timeout:g} s')

    def close(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        try:
            ready = self._pipe.poll(STARTING) and self._pipe.recv() == 'ready'
        except EOFError:
            ready = False
        if not ready:
            self.close()
            raise RuntimeError('the answer checker does not start; is math-verify installed?')


def _serve(pipe) -> None:
    """Runs in the process: verdicts, or what went wrong as text."""
    import math_verify

    logging.disable(logging.WARNING)  # it warns that its own time limits are off: this process is killed instead
    pipe.send('ready')
    while True:
        truth, stated = pipe.recv()
        try:
            parsed = [math_verify.parse(f'${text}$', parsing_timeout=None) for text in (truth, stated)]
            if all(isinstance(value, str) for value in parsed[0]):  # it gives the text back, or nothing
                pipe.send(f'it cannot read the true answer {truth!r}')
            else:  # an answer that states nothing mathematical is wrong
                pipe.send(bool(parsed[1]) and bool(math_verify.verify(*parsed, timeout_seconds=None)))
        except Exception as error:
            pipe.send(repr(error))
