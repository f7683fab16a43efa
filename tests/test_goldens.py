"""The decoder against numbers that transformers + torch computed (tools/make_goldens.py); torch is not needed here."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import reference

from qedjax.model.config import RopeScaling

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
TOLERANCE = 1e-4

loss_and_logits = jax.jit(reference.loss_and_logits)


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f'{case}.npz') as file:
        return dict(file)


def logits_error(case: str, logits) -> float:
    """Of the worst position that the golden file keeps."""
    documents = reference.unpack(np.asarray(logits), reference.documents_of(case))
    kept = [x[reference.sampled(len(x))] for x in documents]
    return max(reference.error(x, golden(case)[f'logits/{i}'], keep=1) for i, x in enumerate(kept))


@pytest.mark.parametrize('case', ['qwen3', 'qwen2_untied', 'llama_bias'])  # every kind of parameter
def test_gradients(case, mesh):
    model = reference.seeded_model(reference.CASES[case])
    _, gradients = reference.evaluate(model, reference.pack(reference.documents_of(case), 64))
    digests = reference.digest(reference.named(gradients))
    assert {f'gradient/{name}' for name in digests} == {key for key in golden(case) if key.startswith('gradient/')}
    for name, digest in digests.items():  # the first entry is the norm, on which the projections' scale depends
        expected = golden(case)[f'gradient/{name}']
        np.testing.assert_allclose(digest, expected, atol=TOLERANCE * expected[0], rtol=0, err_msg=name)


@pytest.mark.parametrize('case', reference.CASES)
def test_loss_and_logits(case, mesh):
    model = reference.seeded_model(reference.CASES[case])
    loss, logits = loss_and_logits(model, reference.pack(reference.documents_of(case), 64))
    np.testing.assert_allclose(loss, golden(case)['loss'], rtol=1e-5)
    assert logits_error(case, logits) < TOLERANCE


@pytest.mark.parametrize(('case', 'change'), [
    ('theta_5e6', {'rope_theta': 1e6}),  # what the 2507 models become where theta is forgotten
    ('theta_5e6', {'norm_eps': 1e-5}),
    ('theta_5e6', {'qk_norm': False}),
    ('yarn', {'rope_scaling': RopeScaling()}),
    ('yarn', {'rope_scaling': RopeScaling('yarn', factor=4.0, original_positions=2048, attention_factor=1.0)}),
    ('linear', {'rope_scaling': RopeScaling()}),
    ('llama3', {'rope_scaling': RopeScaling('linear', factor=8.0)}),
])
def test_a_wrong_config_misses_the_golden_numbers(case, change, mesh):
    model = reference.seeded_model(dataclasses.replace(reference.CASES[case], **change))
    _, logits = loss_and_logits(model, reference.pack(reference.documents_of(case), 64))
    assert logits_error(case, logits) > 10 * TOLERANCE
