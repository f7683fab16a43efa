"""One way in for every launcher: both kinds of folder give the same model, config and tokenizer."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from hf_folders import write_folder

from qedjax.checkpoint import load
from qedjax.checkpoint.hf import load_hf
from qedjax.checkpoint.load import (
    HF_FILES,
    copy_tokenizer,
    files_folder,
    is_hf_folder,
    load_model,
    load_tokenizer,
    read_generation_config,
    resolve_config,
    saved_config,
    tokenizer_folder,
)
from qedjax.checkpoint.manager import Checkpointer, save_tree
from qedjax.model.config import RopeScaling
from qedjax.sharding import MeshConfig, make_mesh
from qedjax.testing import tiny_config, tiny_tokenizer

CFG = tiny_config('llama', param_dtype='bfloat16', rope_scaling=RopeScaling('llama3', 8.0, 1024, low_freq_factor=2.0))
RUNTIME = tiny_config('qwen3', num_layers=7, param_dtype='float32', dtype='bfloat16', remat='dots', attention_block=8)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """(Hugging Face folder, workdir of a run with steps 3 and 5 of the same weights), both with a tokenizer."""
    root = tmp_path_factory.mktemp('load')
    write_folder(root / 'hf', CFG, shards=2)
    tiny_tokenizer().save_pretrained(root / 'hf')
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_hf(root / 'hf', CFG, mesh)
    with Checkpointer(root / 'run' / 'checkpoints', {}) as checkpoints:
        for step in (3, 5):
            tree = {'model': model, 'step': np.int32(step)}
            checkpoints.save(step, tree, {'model': dataclasses.asdict(CFG), 'position': step})
    copy_tokenizer(root / 'hf', root / 'run')
    (root / 'run' / 'config.json').write_text(json.dumps({'init': '', 'model': dataclasses.asdict(CFG)}))
    return root / 'hf', root / 'run'


def arrays(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def test_kinds_of_folders(folders, tmp_path):
    hf, run = folders
    assert is_hf_folder(hf)
    assert not any(is_hf_folder(path) for path in (run, run / 'checkpoints', run / 'checkpoints' / '3'))
    shutil.copy(hf / 'config.json', tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'pickle')
    assert is_hf_folder(tmp_path)  # so that the error speaks of safetensors rather than of checkpoints
    with pytest.raises(ValueError, match='is not a folder; give a Hugging Face folder or a checkpoint'):
        is_hf_folder(tmp_path / 'nothing')


def test_sizes_come_from_the_checkpoint_and_the_rest_from_the_run(folders):
    expected = dataclasses.replace(CFG, param_dtype='float32', dtype='bfloat16', remat='dots', attention_block=8)
    for path in folders:
        assert resolve_config(path, RUNTIME) == expected
    assert resolve_config('', RUNTIME) == RUNTIME
    with pytest.raises(ValueError, match='remat'):
        resolve_config(folders[0], dataclasses.replace(RUNTIME, remat='some'))


def test_saved_configs(folders, tmp_path):
    assert saved_config(folders[1]) == CFG
    fields = dataclasses.asdict(CFG)
    later = {name: value for name, value in fields.items() if name != 'remat'}
    for name, metadata in {'none': {}, 'unknown': {'model': {**fields, 'num_experts': 8}}, 'older': {'model': later}}.items():
        save_tree(tmp_path / name, {'model': np.zeros(1)}, metadata)
    for name in ('none', 'unknown'):
        with pytest.raises(ValueError, match=f'{name} has no model config that this version knows'):
            saved_config(tmp_path / name)
    assert saved_config(tmp_path / 'older') == dataclasses.replace(CFG, remat='full')  # a field added later has its default
    with pytest.raises(ValueError, match='no complete checkpoint in'):
        saved_config(tmp_path / 'nothing')


@pytest.mark.parametrize('mesh_config', [MeshConfig(fsdp=1), MeshConfig(fsdp=2, tensor=4)])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_both_kinds_give_the_same_model_on_any_mesh(folders, mesh_config, dtype, mesh):
    hf, run = folders
    expected = arrays(load_hf(hf, CFG, mesh))
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.fsdp * mesh_config.tensor])
    for path in (hf, run, run / 'checkpoints', run / 'checkpoints' / '3'):
        model = load_model(path, mesh, dataclasses.replace(CFG, param_dtype=dtype))
        for leaf, value in zip(jax.tree.leaves(model), expected, strict=True):
            assert (leaf.dtype, leaf.sharding.mesh) == (dtype, mesh)
            np.testing.assert_array_equal(np.asarray(leaf).astype(np.float32), value.astype(np.float32))
        assert model.layers.mlp.w_up[...].addressable_shards[0].data.size * mesh.size == model.layers.mlp.w_up[...].size


def test_tokenizer_of_every_form_of_path(folders, tmp_path, monkeypatch):
    hf, run = folders
    shutil.copytree(run / HF_FILES, tmp_path / 'only')
    assert tokenizer_folder(hf) == hf
    assert tokenizer_folder(tmp_path / 'only') == tmp_path / 'only'
    monkeypatch.chdir(run / 'checkpoints')
    for path in (run, run / 'checkpoints', run / 'checkpoints' / '5', '.', '5'):
        assert tokenizer_folder(path).samefile(run / HF_FILES)
        assert read_generation_config(path) == {'eos_token_id': [151645, 151643]}
    assert load_tokenizer('5').encode('the <think>') == tiny_tokenizer().encode('the <think>')
    (tmp_path / 'only' / 'generation_config.json').unlink()
    assert read_generation_config(tmp_path / 'only') == {}
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match="name the tokenizer's folder"):
        tokenizer_folder(tmp_path / 'empty')
    assert files_folder(tmp_path / 'empty') is None


def test_a_run_keeps_every_file_but_weights(folders):
    hf, run = folders

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}

    expected = {name: data for name, data in files(hf).items() if 'safetensors' not in name}
    assert 'docs/LICENSE' in expected
    assert files(run / HF_FILES) == expected


def test_a_copy_that_was_killed_is_made_again(folders, tmp_path, monkeypatch):
    def disk_full(source, target):
        target.mkdir()
        (target / 'tokenizer.json').write_text('half')
        raise OSError('disk full')

    with monkeypatch.context() as patch:
        patch.setattr(load, 'copy_other_files', disk_full)
        with pytest.raises(OSError, match='disk full'):
            copy_tokenizer(folders[0], tmp_path)
    assert not (tmp_path / HF_FILES).exists()
    copy_tokenizer(folders[0], tmp_path)
    assert sorted(os.listdir(tmp_path / HF_FILES)) == sorted(os.listdir(folders[1] / HF_FILES))
    assert os.listdir(tmp_path) == [HF_FILES]
    (tmp_path / HF_FILES / 'tokenizer.json').write_text('mine')
    copy_tokenizer(folders[0], tmp_path)  # a resumed run leaves its own alone
    assert (tmp_path / HF_FILES / 'tokenizer.json').read_text() == 'mine'
