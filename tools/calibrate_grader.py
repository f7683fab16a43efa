"""How far a judge agrees with people, and whether it can be fooled.

python tools/calibrate_grader.py --config=configs/qed_nano_rl.py --data=graded.jsonl --out=DIR [--columns=proof=model_solution,points=score]
    [--full=7] [--limit=50] [--replay=transcripts.jsonl] [--config.judge.remote.base_url=http://HOST/v1 ...]

Rows hold problem, rubric, proof and points (what people gave, out of --full), and perhaps solution and problem_id. The judge is that of an
RL config. Prints mean absolute error, bias, bucket accuracy, order within problems, the error of advantages, the share that it could
not grade, and what canaries earned: a restated problem, confident nonsense, a planted mark. Reports are kept in DIR; with --replay they
are read from another run's transcripts, nothing is called, and there are no canaries.
"""

import asyncio
import dataclasses
import json
import pathlib

from absl import flags
from ml_collections import config_flags

from qedjax import cli
from qedjax.data.sources import Field, Source, read_rows
from qedjax.grading.calibration import agreement, canaries
from qedjax.grading.grade import FULL, Graded
from qedjax.grading.judge import Judge
from qedjax.llm.remote import RemoteEndpoint
from qedjax.metrics import Progress

CONFIG = config_flags.DEFINE_config_file('config', None, 'RL config with the judge.', lock_config=True)
DATA = flags.DEFINE_string('data', None, 'JSONL, CSV or Parquet file of graded proofs.', required=True)
OUT = flags.DEFINE_string('out', None, 'Folder for transcripts, the cache and grades.jsonl.', required=True)
COLUMNS = flags.DEFINE_string('columns', '', 'Our fields named after the columns, e.g. proof=answer,points=score.')
SCALE = flags.DEFINE_float('full', 7.0, 'Full marks of the points column.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Proofs to grade; 0 is all.')
CANARIES = flags.DEFINE_integer('canaries', 8, 'Problems that each canary is tried on.')
REPLAY = flags.DEFINE_string('replay', None, 'transcripts.jsonl of another run to read the reports from; nothing is called.')
SCHEMA = (Field('problem'), Field('rubric', (str, list)), Field('proof'), Field('points', (int, float)), Field('solution', required=False),
          Field('problem_id', required=False))


class Nobody:
    """The model of a replay: whatever was not recorded cannot be had."""

    async def complete(self, prompt, params):
        raise ValueError('this report is not in the transcripts')

    async def close(self):
        pass


async def measure(judge: Judge, rows: list[dict]) -> dict[str, float]:
    """Grades every proof, and the canaries on the first problems; writes grades.jsonl."""
    progress, done = Progress('grade', len(rows)), 0

    async def one(row):
        nonlocal done
        grade = await judge.grade(row, row['proof'])
        done += 1
        progress.update(done)
        return grade

    grades = await asyncio.gather(*map(one, rows))
    human = [row['points'] * FULL / SCALE.value for row in rows]
    with (pathlib.Path(OUT.value) / 'grades.jsonl').open('w', encoding='utf-8') as file:
        for row, grade, points in zip(rows, grades, human, strict=True):
            file.write(json.dumps({'problem': row['problem'], 'proof': row['proof'], 'human': points, 'grade': vars(grade)}) + '\n')
    kept = [(row.get('problem_id') or row['problem'], g.score, h) for row, g, h in zip(rows, grades, human, strict=True)
            if isinstance(g, Graded)]
    result = agreement(*(zip(*kept, strict=True) if kept else ((), (), ()))) | {'graded': len(kept), 'ungraded': len(rows) - len(kept)}
    first = list({row['problem']: row for row in rows}.values())[: 0 if REPLAY.value else CANARIES.value]
    for name in canaries(first[0]) if first else ():
        earned = await asyncio.gather(*(judge.grade(row, canaries(row)[name]) for row in first))
        scores = [grade.score for grade in earned if isinstance(grade, Graded)]
        result[f'canary/{name}'] = sum(scores) / len(scores) if scores else float('nan')
    return result


async def closing(judge: Judge, rows: list[dict]) -> dict[str, float]:
    """measure, and the judge closed whatever happens."""
    try:
        return await measure(judge, rows)
    finally:
        await judge.close()


def main(_) -> None:
    if CONFIG.value is None:
        raise ValueError('no --config: name an RL config with a judge, e.g. --config=configs/qed_nano_rl.py')
    rows, report = read_rows(Source(DATA.value, columns=COLUMNS.value, limit=LIMIT.value), SCHEMA)
    print(f'{DATA.value}: {report}')
    judge_config = CONFIG.value.judge
    if REPLAY.value:  # what was not recorded says nothing of the judge
        judge_config = dataclasses.replace(judge_config, breaker=len(rows) + 1)
    judge = Judge(judge_config, Nobody() if REPLAY.value else RemoteEndpoint(judge_config.remote), OUT.value)
    for row in rows:
        judge.check(row)
    if REPLAY.value:
        judge.remember(REPLAY.value)
    for name, value in asyncio.run(closing(judge, rows)).items():
        print(f'{name:>16} {value:8.3f}')


if __name__ == '__main__':
    cli.run(main)
