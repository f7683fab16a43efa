"""Writes tests/goldens/*.npz: what transformers + torch compute for the cases of tests/reference.py.

    python tools/make_goldens.py [case ...]

Weights and documents come from seeds, so a file holds results only: logits at a few positions and digests of every
gradient. Needs the extra `parity`. Run it when a case is added or changed; others keep their numbers up to rounding.
"""

import pathlib
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import reference
import torch
import torch_reference
import transformers

from qedjax.sharding import MeshConfig, make_mesh


def golden(case: str) -> dict[str, np.ndarray]:
    """Everything that test_goldens.py compares for one case."""
    model = reference.seeded_model(reference.CASES[case])
    rows = reference.documents_of(case)
    documents = [doc for row in rows for doc in row]
    loss, logits, gradients = torch_reference.evaluate(torch_reference.build(model), model, documents)
    versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
    out = {'loss': np.float64(loss), 'made_with': np.array(versions)}
    out |= {f'logits/{i}': x[reference.sampled(len(x))] for i, x in enumerate(logits)}
    out |= {f'gradient/{name}': x for name, x in reference.digest(gradients).items()}
    return out


def main(cases: list[str]) -> None:
    folder = ROOT / 'tests' / 'goldens'
    folder.mkdir(exist_ok=True)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        for case in cases or reference.CASES:
            np.savez_compressed(folder / f'{case}.npz', **golden(case))
            print(f'{case}.npz: {(folder / f"{case}.npz").stat().st_size:,} bytes')


if __name__ == '__main__':
    main(sys.argv[1:])
