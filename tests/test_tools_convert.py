"""Whole conversions: both ways and back, what they refuse, and what is left behind when they fail."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_folders import random_tensors, write_folder

from qedjax.checkpoint import convert, hf, manager
from qedjax.checkpoint.convert import hf_to_orbax, orbax_to_hf
from qedjax.checkpoint.load import HF_FILES, saved_config
from qedjax.checkpoint.manager import Checkpointer, CheckpointError, read_manifest
from qedjax.checkpoint.safetensors_io import read_folder
from qedjax.model.hf_config import from_hf, read_config
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import tiny_config, tiny_tokenizer
from tools import compare_logits
from tools.compare_logits import logits_error, verify_logits

TOOLS = pathlib.Path(__file__).parents[1] / 'tools'
CASES = {
    'qwen3': tiny_config('qwen3'),
    'qwen3_untied': tiny_config('qwen3', tie_embeddings=False),
    'qwen2': tiny_config('qwen2'),
    'llama': tiny_config('llama', qkv_bias=True, output_bias=True),
}
CFG = CASES['qwen3']


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.array(entry.view()) for name, entry in read_folder(folder).items()}


def other_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and 'safetensors' not in path.name}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(value.view(np.uint8), right[name].view(np.uint8), err_msg=name)


def as_snapshot(folder: pathlib.Path, snapshot: pathlib.Path) -> None:
    """The same files as the hub's cache holds them: links to blobs."""
    for path in list(folder.rglob('*')):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


@pytest.mark.parametrize('case', CASES)
def test_there_and_back_is_the_identity(case, tmp_path, capsys):
    source = write_folder(tmp_path / 'blobs', CASES[case], shards=3)
    tiny_tokenizer().save_pretrained(tmp_path / 'blobs')
    as_snapshot(tmp_path / 'blobs', tmp_path / 'hf')
    (tmp_path / 'hf' / '.cache').mkdir()
    (tmp_path / 'hf' / '.cache' / 'lock').touch()
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    assert sorted(os.listdir(tmp_path / 'ob')) == ['checkpoints', HF_FILES]
    assert saved_config(tmp_path / 'ob') == from_hf(read_config(tmp_path / 'hf'), param_dtype='bfloat16')
    orbax_to_hf(tmp_path / 'ob', tmp_path / 'back', verify=True)
    assert_same(tensors_of(tmp_path / 'back'), source)
    assert other_files(tmp_path / 'back') == other_files(tmp_path / 'blobs')
    assert not any(path.is_symlink() for path in (tmp_path / 'back').rglob('*'))
    assert capsys.readouterr().out == f'{len(source)} tensors are those of {tmp_path / "ob"}\n'
    assert sorted(os.listdir(tmp_path)) == ['back', 'blobs', 'hf', 'ob']


def test_any_path_into_a_run_and_any_mesh_it_was_trained_on(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    first = create(lambda: Transformer(CFG, jax.random.key(0)), mesh)
    models = [first, jax.tree.map(lambda x: x + 1, first)]
    with Checkpointer(tmp_path / 'run' / 'checkpoints', {}) as checkpoints:
        for step, model in zip((3, 5), models, strict=True):
            state = {'model': model, 'moments': jax.tree.map(lambda x: 2 * x, model), 'step': np.int32(step)}
            checkpoints.save(step, state, {'model': dataclasses.asdict(CFG)})
    tiny_tokenizer().save_pretrained(tmp_path / 'run' / HF_FILES)
    for i, (path, model) in enumerate((('', models[1]), ('checkpoints', models[1]), ('checkpoints/3', models[0]))):
        out = tmp_path / str(i)
        orbax_to_hf(tmp_path / 'run' / path, out)
        np.testing.assert_array_equal(read_folder(out)['model.embed_tokens.weight'].view(), np.asarray(model.embed[...]))
        assert (out / 'tokenizer.json').read_bytes() == (tmp_path / 'run' / HF_FILES / 'tokenizer.json').read_bytes()
        assert from_hf(read_config(out), dtype='float32', attention_block=16, remat='none') == CFG
    # A model trained from scratch has no file that says where a generation ends, but its tokenizer knows.
    end = tiny_tokenizer().convert_tokens_to_ids('<|im_end|>')
    assert json.loads((out / 'generation_config.json').read_text()) == {'eos_token_id': [end]}
    assert read_config(out)['eos_token_id'] == end


def test_files_may_be_named_or_absent(tmp_path, caplog):
    write_folder(tmp_path / 'hf', CFG)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    shutil.rmtree(tmp_path / 'ob' / HF_FILES)
    orbax_to_hf(tmp_path / 'ob', tmp_path / 'bare')
    assert f'has no {HF_FILES}: only weights and config.json are written' in caplog.text
    assert sorted(os.listdir(tmp_path / 'bare')) == ['config.json', 'model.safetensors']
    orbax_to_hf(tmp_path / 'ob', tmp_path / 'full', files=tmp_path / 'hf')
    assert other_files(tmp_path / 'full') == other_files(tmp_path / 'hf')
    with pytest.raises(ValueError, match='none is not a folder; --files names one'):
        orbax_to_hf(tmp_path / 'ob', tmp_path / 'more', files=tmp_path / 'none')


@pytest.mark.parametrize(('stored', 'asked', 'kept'), [
    ('float32', None, 'float32'), ('float16', None, 'float32'), ('bfloat16', 'float32', 'float32'),
    ('float32', 'bfloat16', 'bfloat16'),
])
def test_dtypes(stored, asked, kept, tmp_path):
    source = write_folder(tmp_path / 'hf', CFG, random_tensors(CFG, stored), torch_dtype=stored)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob', asked)
    arrays = read_manifest(tmp_path / 'ob' / 'checkpoints' / '0')['arrays']
    assert {array['dtype'] for array in arrays.values()} == {kept}
    held = {name: value.astype(kept) for name, value in source.items()}
    for dtype in (None, 'float16' if kept == 'bfloat16' else 'bfloat16'):
        out = tmp_path / f'out_{dtype}'
        orbax_to_hf(tmp_path / 'ob', out, dtype=dtype, verify=True)
        assert_same(tensors_of(out), {name: value.astype(dtype or kept) for name, value in held.items()})
        expected = {**read_config(tmp_path / 'hf'), 'torch_dtype': dtype or kept}
        assert read_config(out) == expected


def test_values_that_overflow_are_named(tmp_path):
    tensors = random_tensors(CFG, 'float32')
    tensors['model.layers.1.mlp.down_proj.weight'][3, 5] = 3.4e38
    write_folder(tmp_path / 'hf', CFG, tensors)
    with pytest.raises(ValueError, match=r'layers.1.mlp.down_proj.weight has values that bfloat16 cannot hold'):
        hf_to_orbax(tmp_path / 'hf', tmp_path / 'no', 'bfloat16')
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    for dtype, name in (('bfloat16', 'layers.mlp.w_down'), ('float16', 'model.layers.1.mlp.down_proj.weight')):
        with pytest.raises(ValueError, match=f'{name} has values that'):
            orbax_to_hf(tmp_path / 'ob', tmp_path / 'no', dtype=dtype)
    assert sorted(os.listdir(tmp_path)) == ['hf', 'ob']


# Refusals: in one sentence, and before anything is written


@pytest.mark.parametrize('kind', ['full target', 'file as target', 'no folder', 'no config', 'no weights', 'cut', 'fp8', 'disk'])
def test_imports_that_are_refused_leave_nothing_behind(kind, tmp_path, monkeypatch):
    folder, target = tmp_path / 'hf', tmp_path / 'ob'
    tensors = random_tensors(CFG)
    if kind == 'fp8':
        tensors['model.layers.0.mlp.up_proj.weight'] = ('F8_E4M3', (64, 32), bytes(64 * 32))
    write_folder(folder, CFG, tensors)
    words = {'full target': 'ob already exists and is not empty', 'file as target': 'ob already exists',
             'no folder': 'none is not a Hugging Face model folder', 'no config': 'it has no config.json',
             'no weights': 'neither model.safetensors nor', 'cut': 'header speaks of', 'fp8': 'is stored as F8_E4M3',
             'disk': r'has 0.0 GB free, but the weights take'}
    if kind == 'full target':
        target.mkdir()
        (target / 'mine').write_text('keep')
    elif kind == 'file as target':
        target.write_text('keep')
    elif kind == 'no config':
        (folder / 'config.json').unlink()
    elif kind == 'no weights':
        (folder / 'model.safetensors').unlink()
    elif kind == 'cut':
        os.truncate(folder / 'model.safetensors', 9999)
    elif kind == 'disk':
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 0))
    before = sorted(map(str, tmp_path.rglob('*')))
    monkeypatch.setattr(convert, 'load_hf', hf.load_hf if kind == 'fp8' else None)
    with pytest.raises(ValueError, match=words[kind]):
        hf_to_orbax(tmp_path / 'none' if kind == 'no folder' else folder, target)
    assert sorted(map(str, tmp_path.rglob('*'))) == before


@pytest.mark.parametrize('kind', ['full target', 'no checkpoint', 'incomplete', 'not a model', 'disk'])
def test_exports_that_are_refused_leave_nothing_behind(kind, tmp_path, monkeypatch):
    write_folder(tmp_path / 'hf', CFG)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    words = {'full target': 'already exists and is not empty', 'no checkpoint': 'no complete checkpoint in',
             'incomplete': r'no complete checkpoint in .*file .* is missing', 'not a model': 'has no model config',
             'disk': r'has 0.0 GB free, but the weights take'}
    if kind == 'full target':
        shutil.copytree(tmp_path / 'hf', tmp_path / 'out')
    elif kind == 'no checkpoint':
        shutil.rmtree(tmp_path / 'ob' / 'checkpoints')
    elif kind == 'incomplete':
        next(path for path in (tmp_path / 'ob').rglob('*') if path.stat().st_size == 320 * 32 * 2).unlink()
    elif kind == 'not a model':
        shutil.rmtree(tmp_path / 'ob')
        manager.save_tree(tmp_path / 'ob', {'model': np.zeros(3)}, {})
    elif kind == 'disk':
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 0))
    before = sorted(map(str, tmp_path.rglob('*')))
    with pytest.raises(ValueError, match=words[kind]):
        orbax_to_hf(tmp_path / 'ob', tmp_path / 'out')
    assert sorted(map(str, tmp_path.rglob('*'))) == before


@pytest.mark.parametrize('place', ['reading', 'copying', 'saving', 'killed'])
def test_an_import_that_fails_halfway_leaves_nothing_and_can_be_repeated(place, tmp_path, monkeypatch):
    write_folder(tmp_path / 'hf', CFG, shards=2)

    def fail(*args, **kwargs):
        raise CheckpointError('No space left on device')

    if place == 'killed':
        (tmp_path / '.ob.incomplete' / 'checkpoints').mkdir(parents=True)
        (tmp_path / '.ob.incomplete' / 'config.json').touch()
    else:
        name = {'reading': 'load_hf', 'copying': 'copy_other_files'}.get(place)
        with monkeypatch.context() as patch:
            patch.setattr(*((convert, name) if name else (manager, 'save_tree')), fail)
            with pytest.raises(CheckpointError, match='No space left'):
                hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
        assert os.listdir(tmp_path) == ['hf']
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    assert sorted(os.listdir(tmp_path / 'ob')) == ['checkpoints', HF_FILES]
    assert sorted(os.listdir(tmp_path)) == ['hf', 'ob']


def test_verification_notices_a_wrong_weight(tmp_path, monkeypatch):
    write_folder(tmp_path / 'hf', CFG)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    save = convert.save_hf

    def wrong(model, folder, **kwargs):
        save(model, folder, **kwargs)
        entry = read_folder(folder)['model.layers.1.self_attn.o_proj.weight']
        with entry.file.open('r+b') as file:
            file.seek(entry.offset + 6)
            file.write(np.array(7, ml_dtypes.bfloat16).tobytes())

    monkeypatch.setattr(convert, 'save_hf', wrong)
    with pytest.raises(ValueError, match=r'model.layers.1.self_attn.o_proj.weight differs from the model'):
        orbax_to_hf(tmp_path / 'ob', tmp_path / 'out', verify=True)


def test_logits_that_differ_from_transformers_are_an_error(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / 'hf', CFG)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
    for error in (5e-3, float('nan')):
        monkeypatch.setattr(compare_logits, 'logits_error', lambda folder, error=error: error)
        with pytest.raises(ValueError, match='is another model in transformers'):
            verify_logits(tmp_path / 'hf', 2e9)
    monkeypatch.setattr(compare_logits, 'logits_error', lambda folder: 5e-6)
    capsys.readouterr()
    verify_logits(tmp_path / 'hf', 2e9)
    verify_logits(tmp_path / 'hf', 1000)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    verify_logits(tmp_path / 'hf', 2e9)
    differ, large, no_torch = capsys.readouterr().out.splitlines()
    assert 'by at most 5.0e-06' in differ
    assert '0.0 billion parameters' in large
    assert 'torch is not installed' in no_torch


# The commands themselves


def command(tool: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(TOOLS.parent)}
    return subprocess.run([sys.executable, TOOLS / f'{tool}.py', *flags], env=environment, capture_output=True, text=True,
                          check=False)


def test_commands(tmp_path):
    source = write_folder(tmp_path / 'hf', CFG, shards=2)
    done = command('hf_to_orbax', f'--hf={tmp_path}/hf', f'--orbax={tmp_path}/ob', '--dtype=float32')
    assert done.returncode == 0, done.stderr
    done = command('orbax_to_hf', f'--orbax={tmp_path}/ob', f'--hf={tmp_path}/out', '--dtype=bfloat16', '--verify',
                   '--logits_up_to=0')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f'{len(source)} tensors are those of {tmp_path}/ob'
    assert_same(tensors_of(tmp_path / 'out'), source)
    refused = command('orbax_to_hf', f'--orbax={tmp_path}/nothing', f'--hf={tmp_path}/more')
    assert (refused.returncode, refused.stdout) == (2, '')
    assert refused.stderr == f'error: no complete checkpoint in {tmp_path}/nothing\n'


@pytest.mark.slow
def test_benchmark_converts_a_random_model_of_a_published_size(tmp_path):
    done = command('bench_convert', '--preset=smollm2_135m', f'--workdir={tmp_path}/bench')
    assert done.returncode == 0, done.stderr
    assert 'weights 0.25 GiB; tensors after both ways bit-equal' in done.stdout
    assert 'orbax_to_hf' in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parity
@pytest.mark.parametrize('case', CASES)
def test_exports_are_the_same_model_in_transformers(case, tmp_path):
    pytest.importorskip('torch')
    write_folder(tmp_path / 'hf', CASES[case], shards=2)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    orbax_to_hf(tmp_path / 'ob', tmp_path / 'out')
    assert logits_error(tmp_path / 'out') < 1e-5
    assert np.abs(read_folder(tmp_path / 'out')['model.embed_tokens.weight'].view()).max() > 0.1  # zeros would agree too


@pytest.mark.parity
def test_verification_by_the_command_includes_the_logits(tmp_path):
    pytest.importorskip('torch')
    write_folder(tmp_path / 'hf', CFG)
    hf_to_orbax(tmp_path / 'hf', tmp_path / 'ob')
    done = command('orbax_to_hf', f'--orbax={tmp_path}/ob', f'--hf={tmp_path}/out', '--verify')
    assert done.returncode == 0, done.stderr
    assert 'logits differ from those of transformers by at most' in done.stdout
