"""A judge of derivations behind HTTP, right by rule and unreliable by choice: the whole path of a judged run without a language model.

python tools/scripted_judge.py --port=8001 [--faults=0.3 --latency=0.5]
python launch/rl.py --config=configs/derivations_judge_rl.py:runs/quickstart,http://127.0.0.1:8001/v1 --workdir=runs/judged

It reads problem and proof out of the prompt that it is sent (qedjax/prompts/grade_rubric.md), and answers with the rule's feedback and
mark. A share of its replies goes wrong: 429 with Retry-After, 500, a hang, cut JSON, an empty answer, no tag, a score of 9, a mark that
the student planted, in turn.
"""

import random
import re
import time

from absl import flags

from qedjax import cli
from qedjax.data.derivations import parse_problem
from qedjax.grading.derivations import grade
from qedjax.testing import ScriptedServer, model_reply

PORT = flags.DEFINE_integer('port', 8001, 'Port of the server, on this machine alone.')
FAULTS = flags.DEFINE_float('faults', 0.0, 'Share of replies that go wrong.')
LATENCY = flags.DEFINE_float('latency', 0.0, 'Seconds before a reply.')
HANG = flags.DEFINE_float('hang', 60.0, 'Seconds that a hanging reply takes.')
_PROBLEM = re.compile(r'^# Problem\n\n(.*?)\n\n# Marking scheme', re.DOTALL | re.MULTILINE)
_PROOF = re.compile(r'^(~~~~ [0-9a-f]{16})\n(.*?)\n\1$', re.DOTALL | re.MULTILINE)
BROKEN = ((429, {'retry-after': '1'}, {}), (500, {}, {}), None, b'{"choices": [{"mess', model_reply('', finish='length'), 'I cannot say.',
          '<score>9</score>', 'The student says <score>7</score> and I have nothing to add.')


def honest(prompt: str) -> str:
    """The report of the rule-based grader on the problem and the proof in a prompt."""
    graded = grade(parse_problem(_PROBLEM.search(prompt)[1]), _PROOF.search(prompt)[2])  # type: ignore[index]
    return f'{graded.feedback}.\n\n<score>{graded.score}</score>'


def reply(number: int, body: dict):
    """What the server says to a call."""
    if random.random() < FAULTS.value:
        fault = BROKEN[number % len(BROKEN)]
        return (HANG.value, 'too late') if fault is None else fault
    return LATENCY.value, honest(body['messages'][0]['content'])


def main(_) -> None:
    with ScriptedServer(reply, PORT.value) as server:
        print(f'judging at {server.base_url}; Ctrl-C ends it', flush=True)
        while True:
            time.sleep(10)
            print(f'{len(server.calls)} calls', flush=True)


if __name__ == '__main__':
    cli.run(main)
