"""SFT rows from public collections of olympiad proofs.

python tools/proof_rows.py --opc=opc_sample_110_problems.json --matharena=usamo_2025_schemes.jsonl \
    --dsmath=Putnam2024.jsonl,CMO2024.jsonl,IMO2025.jsonl --output=runs/proofs

Reads the Open Proof Corpus (human solutions), MathArena's USAMO 2025 (human solutions) and DeepSeek-Math-V2's predictions (model
proofs); writes train.jsonl and held_out.jsonl with `messages` rows. Every tenth problem is held out, with all of its proofs.
"""

import json
import pathlib
from collections.abc import Iterator

from absl import flags

from qedjax import cli

OPC = flags.DEFINE_string('opc', '', 'opc_sample_*.json of the Open Proof Corpus.')
MATHARENA = flags.DEFINE_list('matharena', [], 'JSONL files of MathArena with problem and solution.')
DSMATH = flags.DEFINE_list('dsmath', [], 'JSONL files of DeepSeek-Math-V2 with question and model_prediction.')
OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
INSTRUCTION = 'Write a complete and rigorous proof.'


def read_proofs() -> Iterator[tuple[str, str]]:
    """(problem, proof) of every file named on the command line."""
    if OPC.value:
        for row in json.loads(pathlib.Path(OPC.value).read_text()):
            yield from ((row['problem'], solution['solution']) for solution in row['solutions'])
    for path in MATHARENA.value:
        yield from ((row['problem'], row['solution']) for row in read_jsonl(path))
    for path in DSMATH.value:
        yield from ((row['question'], row['model_prediction']['proof']) for row in read_jsonl(path))


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def main(_) -> None:
    problems: dict[str, list[str]] = {}
    for problem, proof in read_proofs():
        if proof.strip():
            problems.setdefault(problem, []).append(proof)
    if len(problems) < 10:
        raise ValueError(f'{len(problems)} problems are too few to hold some out; name more files with --opc, --matharena or --dsmath')
    folder = pathlib.Path(OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name, keep in (('train', lambda i: i % 10 != 0), ('held_out', lambda i: i % 10 == 0)):
        rows = [{'messages': [{'role': 'user', 'content': f'{INSTRUCTION}\n\n{problem}'}, {'role': 'assistant', 'content': proof}]}
                for i, (problem, proofs) in enumerate(problems.items()) if keep(i) for proof in proofs]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
        print(f'{folder / name}.jsonl: {len(rows)} rows')


if __name__ == '__main__':
    cli.run(main)
