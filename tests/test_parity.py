"""The decoder against transformers' eager attention, live, in float32."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import reference
import transformers

from qedjax.checkpoint.hf import load_hf
from qedjax.model.attention import attend_packed
from qedjax.model.embedding import lookup
from qedjax.model.hf_config import from_hf, read_config
from qedjax.model.rope import rope_angles
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.rollout.static import generate
from qedjax.sharding import make_rollout_mesh
from qedjax.testing import shared_data
from qedjax.types import SamplingParams

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4


@pytest.fixture(scope='module')
def torch_reference():
    """The module of that name; torch is imported only when a test of this file runs."""
    pytest.importorskip('torch')
    import torch_reference

    return torch_reference


@pytest.mark.parametrize('case', reference.CASES)
def test_packed_rows_equal_documents_one_by_one_in_logits_and_all_gradients(case, mesh, torch_reference):
    model, rows = reference.seeded_model(reference.CASES[case]), reference.documents_of(case)
    (loss, logits), gradients = reference.evaluate(model, reference.pack(rows, 64))
    documents = [doc for row in rows for doc in row]
    their_loss, their_logits, their_gradients = torch_reference.evaluate(torch_reference.build(model), model, documents)
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    for ours, theirs in zip(reference.unpack(np.asarray(logits), rows), their_logits, strict=True):
        assert reference.error(ours, theirs, keep=1) < TOLERANCE  # the worst position
    for name, gradient in reference.named(gradients).items():
        layers = int(name.startswith('layers.'))  # the worst layer
        assert reference.error(gradient, their_gradients[name], keep=layers) < TOLERANCE, name


@pytest.mark.parametrize('case', ['theta_5e6', 'yarn'])
def test_logits_of_a_row_of_8192_positions(case, mesh, torch_reference):
    cfg = dataclasses.replace(reference.CASES[case], attention_block=512)
    model, doc = reference.seeded_model(cfg), reference.document(cfg, 8192, case)
    seen = np.append(np.arange(0, 8192, 97), 8191)

    @jax.jit
    def logits_at(model, batch):
        x = model(batch.tokens, batch.positions, batch.segment_ids)
        return model.logits(x.at[:, seen].get(out_sharding=jax.P()))

    expected = torch_reference.logits_at(torch_reference.build(model), doc.tokens, seen)
    assert reference.error(logits_at(model, reference.pack([[doc]], 8192))[0], expected, keep=1) < TOLERANCE


@pytest.mark.parametrize('case', ['qwen3', 'llama_bias', 'yarn'])
def test_every_layer_at_late_positions(case, mesh, torch_reference):
    """Residuals, values, and keys as a cache holds them: normed, then rotated. At position 0 any order would do."""
    cfg = reference.CASES[case]
    model, doc = reference.seeded_model(cfg), reference.document(cfg, 24, 'late')
    doc = dataclasses.replace(doc, positions=doc.positions + 3000)
    inputs, keys, values = torch_reference.states(torch_reference.build(model), doc)
    batch = reference.pack([[doc]], 24)

    def attend(q, k, v):
        return attend_packed(q, k, v, batch.segment_ids, cfg), (k, v)

    x = lookup(model.embed[...], batch.tokens, cfg.dtype)
    for index in range(cfg.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], model.layers)
        after, (k, v) = layer(x, rope_angles(cfg, batch.positions), attend)
        for ours, theirs in ((x, inputs), (k, keys), (v, values)):
            assert reference.error(ours, theirs[index], keep=2) < TOLERANCE, index
        x = after


@pytest.mark.parametrize('case', ['qwen3', 'qwen2', 'llama', 'yarn', 'llama3'])
def test_64_greedy_ids(case, mesh, torch_reference):
    cfg = reference.CASES[case]
    model, prompt = reference.seeded_model(cfg), reference.document(cfg, 11, 'prompt').tokens
    ids = greedy(model, prompt, 64)
    assert ids == torch_reference.greedy(torch_reference.build(model), prompt, 64)
    assert len(set(ids)) > 8  # not one id for ever, on which any two models could agree


def greedy(model, prompt, count: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count)
    return list(generate(model, [list(prompt)], [params], num_valid=model.cfg.vocab_size, batch=1)[0][0])


@pytest.fixture(scope='module')
def smollm2(torch_reference) -> pathlib.Path:
    """Folder of SmolLM2-135M-Instruct in float32: QEDJAX_SMOLLM2, or made once in the user's cache."""
    if given := os.environ.get('QEDJAX_SMOLLM2'):
        return pathlib.Path(given)
    folder = pathlib.Path.home() / '.cache' / 'qedjax' / 'smollm2-float32'
    if not folder.is_dir():
        tool = shared_data() / 'get_smollm2.py'
        for package in ('gguf', 'accelerate'):
            pytest.importorskip(package)
        temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
        subprocess.run([sys.executable, tool, temporary, 'float32'], check=True)
        temporary.rename(folder)
    return folder


@pytest.mark.real
def test_smollm2_on_real_proofs(mesh, torch_reference, smollm2):
    """Two proofs packed into a row, against each by itself in transformers; then 64 greedy ids of a real problem."""
    cfg = dataclasses.replace(from_hf(read_config(smollm2)), dtype='float32', remat='none', attention_block=256)
    model, theirs = load_hf(smollm2, cfg, mesh), torch_reference.load(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    problems = json.loads((shared_data() / 'opc' / 'opc_sample_110_problems.json').read_text())
    proofs = [tokenizer(problem['solutions'][0]['solution'])['input_ids'] for problem in problems]
    rows = [[reference.whole(ids[:512]) for ids in proofs if len(ids) > 300][:2]]
    batch = reference.pack(rows, 1024)
    logits = jax.jit(reference.loss_and_logits)(model, batch)[1]
    for doc, ours in zip(rows[0], reference.unpack(np.asarray(logits), rows), strict=True):
        want = torch_reference.logits_at(theirs, doc.tokens, doc.positions)
        assert np.abs(ours - want).max() < 1e-3

    chat = [{'role': 'user', 'content': problems[0]['problem']}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)['input_ids']
    assert greedy(model, prompt, 64) == torch_reference.greedy(theirs, np.array(prompt), 64)


def through_the_engine(model, prompts, lengths, slots, num_valid, seed):
    """Greedy completions in shuffled order; a few requests are cancelled on the way and asked again."""
    config = EngineConfig(slots=slots, staged=slots, max_length=192, page_size=16, steps=4, prefill_tokens=256, prefill_rows=(4, 1))
    engine = Engine(model, make_rollout_mesh(), config, num_valid)
    rng = np.random.default_rng(seed)
    order, done, cancelled = rng.permutation(len(prompts)).tolist(), {}, 0
    requests = {engine.submit(prompts[i], SamplingParams(0.0, lengths[i])): i for i in order}
    while engine.pending:
        for request in engine.step():
            done[requests[request]] = request.completion
        if rng.random() < 0.5:
            victim = list(requests)[rng.integers(len(requests))]
            if victim.completion is None:
                engine.cancel(victim)
                cancelled += 1
                requests[engine.submit(victim.prompt, victim.params)] = requests[victim]
    assert cancelled > 0
    return [list(done[i].ids) for i in range(len(prompts))]


@pytest.mark.parity
def test_200_greedy_requests_through_the_engine(mesh, torch_reference):
    model = reference.seeded_model(reference.CASES['qwen3'])
    theirs, rng = torch_reference.build(model), np.random.default_rng(0)
    vocab = model.cfg.vocab_size
    prompts = [rng.integers(0, vocab, n) for n in rng.integers(1, 120, 200)]
    lengths = rng.integers(1, 40, 200).tolist()
    want = [torch_reference.greedy(theirs, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    for slots in (4, 16):
        assert through_the_engine(model, prompts, lengths, slots, vocab, seed=slots) == want


@pytest.mark.real
def test_greedy_requests_of_smollm2_through_the_engine(mesh, torch_reference, smollm2):
    """Its pad id is its EOS id, which means nothing to the engine. Parts of real proofs as prompts."""
    cfg = dataclasses.replace(from_hf(read_config(smollm2)), dtype='float32', remat='none')
    model, theirs = load_hf(smollm2, cfg, mesh), torch_reference.load(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    problems = json.loads((shared_data() / 'opc' / 'opc_sample_110_problems.json').read_text())
    rng = np.random.default_rng(0)
    prompts = [np.array(tokenizer(p['problem'])['input_ids'][: rng.integers(1, 100)]) for p in problems[:16]]
    prompts[0] = np.append(prompts[0], tokenizer.eos_token_id)
    lengths = rng.integers(4, 24, 16).tolist()
    got = through_the_engine(model, prompts, lengths, 4, cfg.vocab_size, seed=1)
    for prompt, length, ids in zip(prompts, lengths, got, strict=True):
        assert ids == torch_reference.greedy(theirs, prompt, length)
