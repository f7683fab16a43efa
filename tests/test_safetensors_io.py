"""Safetensors folders by headers and byte ranges; damaged ones are refused by name."""

import collections
import json
import logging
import os
import pathlib
import tempfile

import hypothesis
import numpy as np
import pytest
from hf_folders import assert_same, random_tensors, tensors_of, write_folder, write_shard
from hypothesis import strategies as st

from qedjax.checkpoint import hf
from qedjax.checkpoint.hf import load_hf, save_hf
from qedjax.checkpoint.safetensors_io import INDEX, create_folder, finish_folder, read_folder, write_tensor
from qedjax.testing import tiny_config

CFG = tiny_config('qwen3', param_dtype='bfloat16')


@hypothesis.given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=8), st.integers(8, 400),
                  st.sampled_from(['float32', 'bfloat16', 'float16']))
def test_any_tensors_survive_any_shard_size(shapes, max_shard_bytes, dtype):
    rng = np.random.default_rng(0)
    tensors = {f't{i}': rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shapes = {name: x.shape for name, x in tensors.items()}
        entries = create_folder(folder, shapes, np.dtype(dtype), max_shard_bytes)
        for name, x in tensors.items():
            write_tensor(entries[name], [x[:1], x[1:]])
        finish_folder(folder, entries)
        assert_same(tensors_of(folder), tensors)
        sizes = collections.Counter()
        for entry in entries.values():
            sizes[entry.file] += entry.nbytes
        largest = max(x.nbytes for x in tensors.values())
        assert max(sizes.values()) <= max(max_shard_bytes, largest)


def test_import_touches_only_the_pages_of_a_part(tmp_path, mesh):
    """A part of a weight is a view of the file, not a copy of the tensor."""
    folder = tmp_path / 'hf'
    write_folder(folder, CFG)
    entry = read_folder(folder)['model.layers.0.mlp.gate_proj.weight']
    assert isinstance(entry.view().reshape(entry.shape)[8:16, :4].base, np.memmap)


# B01


def damaged(tmp_path: pathlib.Path, kind: str) -> pathlib.Path:
    folder = tmp_path / 'hf'
    write_folder(folder, CFG, shards=2)
    second, index = folder / 'model-00002-of-00002.safetensors', json.loads((folder / INDEX).read_text())
    size = second.stat().st_size
    if kind == 'shard missing':
        second.unlink()
    elif kind == 'tensor only in index':
        index['weight_map']['model.layers.7.mlp.up_proj.weight'] = second.name
    elif kind == 'tensor only in shard':
        del index['weight_map']['model.norm.weight']
    elif kind == 'tensor in the other shard':
        index['weight_map']['model.norm.weight'] = 'model-00001-of-00002.safetensors'
    elif kind == 'outside':
        index['weight_map']['model.norm.weight'] = '../other.safetensors'
    elif kind == 'index cut':
        (folder / INDEX).write_text(json.dumps(index)[:-20])
        return folder
    elif kind == 'index missing':
        (folder / INDEX).unlink()
        return folder
    elif kind == 'both layouts':
        write_shard(folder / 'model.safetensors', random_tensors(CFG))
    elif kind == 'cut':
        os.truncate(second, size - 1)
    elif kind == 'header cut':
        os.truncate(second, 100)
    elif kind == 'empty':
        os.truncate(second, 0)
    elif kind == 'too long':
        os.truncate(second, size + 8)
    elif kind == 'another file':
        second.write_bytes(b'<html>' * 1000)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(('kind', 'words'), [
    ('shard missing', 'lacks model-00002-of-00002.safetensors'),
    ('tensor only in index', 'lacks the tensor model.layers.7.mlp.up_proj.weight'),
    ('tensor only in shard', 'holds the tensor model.norm.weight, which model.safetensors.index.json does not list'),
    ('tensor in the other shard', 'lacks the tensor model.norm.weight'),
    ('outside', 'names ../other.safetensors, which is not a file of the folder'),
    ('index cut', 'is not an index of safetensors files'),
    ('index missing', 'neither model.safetensors nor model.safetensors.index.json'),
    ('both layouts', 'has both model.safetensors and model.safetensors.index.json'),
    ('cut', r'model-00002-of-00002.safetensors has \d+ bytes, but its header speaks of'),
    ('header cut', 'has 100 bytes, too few for its header'),
    ('empty', 'has 0 bytes, too few for its header'),
    ('too long', 'but its header speaks of'),
    ('another file', 'too few for its header, or is no safetensors file'),
])
def test_damaged_folders_are_refused_by_name_before_anything_is_read(kind, words, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(hf, '_load', None)
    with pytest.raises(ValueError, match=words):
        load_hf(damaged(tmp_path, kind), CFG, mesh)


def test_a_stray_file_is_not_read_and_one_warning_says_so(tmp_path, mesh, caplog):
    folder = tmp_path / 'hf'
    source = write_folder(folder, CFG, shards=2)
    write_shard(folder / 'consolidated.safetensors', random_tensors(CFG, seed=1))
    (folder / 'zero.safetensors').write_bytes(b'')
    with caplog.at_level(logging.WARNING):
        model = load_hf(folder, CFG, mesh)
    assert [record.message for record in caplog.records] == [
        f'{folder}: not read, since no index names it: consolidated.safetensors, zero.safetensors']
    save_hf(model, tmp_path / 'out', files=folder)
    assert_same(tensors_of(tmp_path / 'out'), source)


def header(tensors: dict, data: bytes) -> bytes:
    text = json.dumps(tensors).encode() if isinstance(tensors, dict) else tensors
    return len(text).to_bytes(8, 'little') + text + data


def float32(shape: list[int], start: int, stop: int) -> dict:
    return {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, stop]}


@pytest.mark.parametrize(('file', 'words'), [
    (header({'a': float32([2], 0, 4)}, bytes(4)), 'a has 4 bytes, but its shape calls for 8'),
    (header({'a': float32([1], 4, 8)}, bytes(8)), 'a gap, or an overlap, at byte 0'),
    (header({'a': float32([1], 0, 4), 'b': float32([1], 0, 4)}, bytes(4)), 'a gap, or an overlap, at byte 4'),
    (header({'a': {'dtype': 'F32', 'shape': [1]}}, bytes(4)), 'is no safetensors file'),
    (header(b'{"a": 1, "a": 2}', b''), 'a name occurs twice'),
    (header(b'{"a": 1', b''), 'is no safetensors file'),
])
def test_headers_that_contradict_themselves_are_refused(file, words, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(file)
    with pytest.raises(ValueError, match=words):
        read_folder(tmp_path)
