"""One-step word problems (MAWPS, `input` and `target` in JSONL) to data for SFT and RL, split once and for all.

python tools/word_problems.py --mawps=mawps_singleop.jsonl --out=DIR [--held_out=160]

Writes train.jsonl and held_out.jsonl (problem, answer) and sft.jsonl: prompts of training problems with short worked answers that end in
'The answer is N.'. The step that works is found by trying the four operations on the two numbers of a problem; problems where none or
several fit are not written to sft.jsonl, and are counted.
"""

import itertools
import json
import math
import pathlib
import re

import numpy as np
from absl import flags

from qedjax import cli

MAWPS = flags.DEFINE_string('mawps', None, 'JSONL file with input and target.', required=True)
OUT = flags.DEFINE_string('out', None, 'Folder for the three files.', required=True)
HELD_OUT = flags.DEFINE_integer('held_out', 160, 'Problems held out.')
NUMBER = re.compile(r'\d+(?:\.\d+)?')
OPERATIONS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b, '/': lambda a, b: a / b if b else None}


def plain(number: float) -> str:
    """Digits of a number, without '.0'."""
    return str(int(number)) if number == int(number) else str(number)


def worked_answer(problem: str, target: float) -> str | None:
    """The one equation over two numbers of the problem that gives the target, and the answer; None if there is none or a choice."""
    numbers = [float(n) for n in NUMBER.findall(problem)]
    found = {}
    for a, b in itertools.combinations(numbers, 2):
        for x, sign, y in ((a, '+', b), (a, '*', b), (a, '-', b), (b, '-', a), (a, '/', b), (b, '/', a)):
            value = OPERATIONS[sign](x, y)
            if value is not None and math.isclose(value, target):
                found[sign, frozenset((x, y))] = f'{plain(x)} {sign} {plain(y)} = {plain(target)}'
    return f'{next(iter(found.values()))}. The answer is {plain(target)}.' if len(found) == 1 else None


def main(_) -> None:
    out = pathlib.Path(OUT.value)
    rows = [json.loads(line) for line in pathlib.Path(MAWPS.value).read_bytes().split(b'\n') if line.strip()]
    problems = list(dict.fromkeys((row['input'].strip(), float(row['target'])) for row in rows))
    order = np.random.default_rng(0).permutation(len(problems))
    held_out, train = ([problems[i] for i in part] for part in (order[: HELD_OUT.value], order[HELD_OUT.value :]))
    worked = [(text, worked_answer(text, target)) for text, target in train]
    files = {
        'held_out': [{'problem': text, 'answer': plain(target)} for text, target in held_out],
        'train': [{'problem': text, 'answer': plain(target)} for text, target in train],
        'sft': [{'prompt': text, 'completion': answer} for text, answer in worked if answer]}
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (out / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
    print(f'{len(rows)} rows, {len(problems)} different; ' + ', '.join(f'{name}.jsonl: {len(lines)}' for name, lines in files.items()))


if __name__ == '__main__':
    cli.run(main)
