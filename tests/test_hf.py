"""Weights from and to Hugging Face folders."""

import collections
import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folders import assert_same, random_tensors, tensors_of, write_folder, write_shard

from qedjax.checkpoint import hf
from qedjax.checkpoint.hf import config_bytes, load_hf, save_hf, stored_dtype, verify_hf
from qedjax.checkpoint.hf_names import TABLE, match, torch_shapes
from qedjax.checkpoint.safetensors_io import INDEX, read_folder
from qedjax.model.hf_config import from_hf, read_config
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, abstract, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_config, tiny_tokenizer

CONFIGS = {
    'qwen3': tiny_config('qwen3'),
    'qwen3_untied': tiny_config('qwen3', tie_embeddings=False),
    'qwen2': tiny_config('qwen2'),
    'llama': tiny_config('llama'),
    'llama_biases': tiny_config('llama', qkv_bias=True, output_bias=True),
}
CFG = tiny_config('qwen3', param_dtype='bfloat16')
UNTIED = dataclasses.replace(CFG, tie_embeddings=False)
WEIGHT_FILES = ('.safetensors', '.index.json')


def other_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and not path.name.endswith(WEIGHT_FILES)}


def logits(model: Transformer) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    return np.asarray(_logits(model, tokens, positions))


@jax.jit
def _logits(model, tokens, positions):
    return model.logits(model(tokens, positions, jnp.ones_like(tokens)))


# The table


def test_every_parameter_has_one_name_and_every_name_one_parameter():
    assert len({weight.name for weight in TABLE}) == len({weight.path for weight in TABLE}) == len(TABLE)
    everything = tiny_config('qwen3', qkv_bias=True, output_bias=True, tie_embeddings=False)
    model = abstract(lambda: Transformer(everything, jax.random.key(0)), make_rollout_mesh())
    assert {weight.path for weight, _ in match(model)} == {weight.path for weight in TABLE}
    with pytest.raises(AssertionError, match='0 rows of the name table match the parameter more'):
        match({'more': jnp.zeros(1)})


@pytest.mark.parametrize('case', CONFIGS)
def test_import_puts_every_weight_in_its_place(case, tmp_path, mesh):
    cfg = CONFIGS[case]
    folder = tmp_path / 'hf'
    source = write_folder(folder, cfg, shards=3)
    model = load_hf(folder, cfg, mesh)
    assert torch_shapes(model) == {name: x.shape for name, x in source.items()}
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    x = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    source = {name: value.astype(np.float32) for name, value in source.items()}
    layer, attn = 'model.layers.1.', model.layers.attn
    # As torch computes: y = W x + b, heads in order.
    for ours, name, heads in ((attn.wq, 'q', N), (attn.wk, 'k', K), (attn.wv, 'v', K)):
        expected = (source[f'{layer}self_attn.{name}_proj.weight'] @ x).reshape(heads, H)
        np.testing.assert_allclose(np.einsum('D,DNH->NH', x, ours[1]), expected, rtol=1e-5, atol=1e-6)
    y = np.random.default_rng(2).standard_normal((N, H)).astype(np.float32)
    expected = source[f'{layer}self_attn.o_proj.weight'] @ y.ravel()
    np.testing.assert_allclose(np.einsum('NH,NHD->D', y, attn.wo[1]), expected, rtol=1e-5, atol=1e-6)
    mlp = model.layers.mlp
    for ours, name in ((mlp.w_gate, 'gate'), (mlp.w_up, 'up'), (mlp.w_down, 'down')):
        np.testing.assert_array_equal(ours[1].T, source[f'{layer}mlp.{name}_proj.weight'])
    for ours, name in ((attn.bq, 'q'), (attn.bk, 'k'), (attn.bv, 'v'), (attn.bo, 'o')):
        if ours is not None:
            np.testing.assert_array_equal(np.ravel(ours[1]), source[f'{layer}self_attn.{name}_proj.bias'])
    np.testing.assert_array_equal(model.layers.attn_norm[1], source[f'{layer}input_layernorm.weight'])
    np.testing.assert_array_equal(model.layers.mlp_norm[1], source[f'{layer}post_attention_layernorm.weight'])
    np.testing.assert_array_equal(model.final_norm[...], source['model.norm.weight'])
    np.testing.assert_array_equal(model.embed[...], source['model.embed_tokens.weight'])
    np.testing.assert_array_equal(model.head, source.get('lm_head.weight', source['model.embed_tokens.weight']))


@pytest.mark.parametrize('case', CONFIGS)
@pytest.mark.parametrize('shards', [1, 3])
def test_import_export_import_is_the_identity(case, shards, tmp_path, mesh):
    cfg = dataclasses.replace(CONFIGS[case], param_dtype='bfloat16')
    first, second = tmp_path / 'first', tmp_path / 'second'
    source = write_folder(first, cfg, shards=shards)
    model = load_hf(first, cfg, mesh)
    save_hf(model, second, files=first, max_shard_bytes=30_000 if shards > 1 else 5e9)
    assert ((second / INDEX).exists(), len(list(second.glob('*.safetensors'))) > 2) == (shards > 1, shards > 1)
    assert_same(tensors_of(second), source)
    assert other_files(second) == other_files(first)
    assert verify_hf(model, second) == len(source)
    assert_same(parameters(load_hf(second, cfg, mesh)), parameters(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['first', 'second']


def parameters(model: Transformer) -> dict[str, np.ndarray]:
    return {weight.path: np.asarray(leaf) for weight, leaf in match(model)}


def test_safetensors_library_reads_our_files(tmp_path, mesh):
    import safetensors

    cfg = CONFIGS['qwen3']
    source = write_folder(tmp_path / 'in', cfg, random_tensors(cfg, 'float32'))
    save_hf(load_hf(tmp_path / 'in', cfg, mesh), tmp_path / 'out', max_shard_bytes=30_000)
    read = {}
    for path in (tmp_path / 'out').glob('*.safetensors'):
        assert path.stat().st_size < 50_000
        with safetensors.safe_open(path, 'numpy') as file:
            assert file.metadata() == {'format': 'pt'}
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert_same(read, source)


# Sharding


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'data': 2, 'context': 2, 'fsdp': 2}])
def test_sharded_import_and_export_are_the_same_and_each_device_reads_its_part(sizes, tmp_path, monkeypatch, mesh):
    one = load_hf(tmp_path_with(tmp_path, UNTIED), UNTIED, mesh)
    count, make = collections.Counter(), jax.make_array_from_callback

    def counting(shape, sharding, callback):
        count.clear()
        array = make(shape, sharding, callback)
        shard = math.prod(sharding.shard_shape(shape)) * 2
        copies = {str(index) for index in sharding.devices_indices_map(shape).values()}
        # What is read for a leaf is its parts, once a device at most, and no device's part is more than its shard.
        assert len(copies) * shard <= count['read'] <= 8 * shard, (shape, sharding)
        return array

    monkeypatch.setattr(jax, 'make_array_from_callback', counting)
    eight = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(eight):
        model = load_hf(tmp_path / 'hf', UNTIED, eight, lambda size: count.update(read=size))
        assert all(leaf.sharding.mesh == eight for _, leaf in match(model))
        gate = model.layers.mlp.w_gate[...]
        assert gate.addressable_shards[0].data.size == gate.size // (sizes['fsdp'] * sizes.get('tensor', 1))
        save_hf(model, tmp_path / 'eight')
        assert verify_hf(model, tmp_path / 'eight') == len(torch_shapes(model))
    assert_same(parameters(model), parameters(one))
    assert_same(tensors_of(tmp_path / 'eight'), tensors_of(tmp_path / 'hf'))


def tmp_path_with(tmp_path: pathlib.Path, cfg, *args, **kwargs) -> pathlib.Path:
    write_folder(tmp_path / 'hf', cfg, *args, **kwargs)
    return tmp_path / 'hf'


# Tensors that do not fit


@pytest.mark.parametrize(('change', 'words'), [
    ({'model.layers.1.self_attn.k_norm.weight': None}, r'lacks 1 of .*: model.layers.1.self_attn.k_norm.weight'),
    ({'model.layers.2.mlp.up_proj.weight': (64, 32)}, r'has 1 tensors .*: model.layers.2.mlp.up_proj.weight'),
    ({'model.layers.0.self_attn.q_proj.bias': (64,)}, 'no place for: model.layers.0.self_attn.q_proj.bias'),
    ({'model.layers.0.self_attn.q_proj.weight': (32, 64)}, r'q_proj.weight has .*\(32, 64\), .* for \(64, 32\)'),
    ({'model.embed_tokens.weight': (319, 32)}, r'embed_tokens.weight has shape \(319, 32\), .* calls for \(320, 32\)'),
    ({'model.norm.weight': (1, 32)}, r'model.norm.weight has shape \(1, 32\)'),
])
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(change, words, tmp_path, mesh, monkeypatch):
    tensors = random_tensors(CFG)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.zeros(shape, ml_dtypes.bfloat16)
    monkeypatch.setattr(hf, '_load', None)
    with pytest.raises(ValueError, match=words):
        load_hf(tmp_path_with(tmp_path, CFG, tensors), CFG, mesh)


def test_buffers_of_old_folders_are_left_out(tmp_path, mesh):
    buffers = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32) for i in range(2)}
    model = load_hf(tmp_path_with(tmp_path, CFG, random_tensors(CFG) | buffers), CFG, mesh)
    save_hf(model, tmp_path / 'out')
    assert_same(tensors_of(tmp_path / 'out'), random_tensors(CFG))


# B03


@pytest.mark.parametrize('case', ['tied', 'tied with its head', 'tied with another head', 'untied without head',
                                  'untied'])
def test_tied_and_untied_with_and_without_head(case, tmp_path, mesh):
    cfg = CFG if case.startswith('tied') else UNTIED
    tensors = random_tensors(UNTIED)
    own = tensors.pop('lm_head.weight')
    if case in ('tied with another head', 'untied'):
        tensors['lm_head.weight'] = own
    elif case == 'tied with its head':
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    folder = tmp_path_with(tmp_path, cfg, tensors, shards=2)
    if case == 'tied with another head':
        with pytest.raises(ValueError, match=r'lm_head.weight is not the embedding, although config.json says tie_'):
            load_hf(folder, cfg, mesh)
        return
    if case == 'untied without head':
        with pytest.raises(ValueError, match=r'lacks 1 of the tensors .*: lm_head.weight'):
            load_hf(folder, cfg, mesh)
        return
    model = load_hf(folder, cfg, mesh)
    head = own if case == 'untied' else tensors['model.embed_tokens.weight']
    np.testing.assert_array_equal(model.head, head)
    save_hf(model, tmp_path / 'out', files=folder)
    ours = {'param_dtype': 'bfloat16', 'dtype': 'float32', 'remat': 'none', 'attention_block': 16}
    again = load_hf(tmp_path / 'out', from_hf(read_config(tmp_path / 'out'), **ours), mesh)
    assert ('lm_head.weight' in read_folder(tmp_path / 'out')) == (case == 'untied')
    np.testing.assert_array_equal(logits(again), logits(model))


# B09 and dtypes


@pytest.mark.parametrize('code', ['F8_E4M3', 'F8_E5M2', 'U8', 'I8', 'F64'])
def test_codes_that_are_not_weights_are_refused_by_dtype_and_key(code, tmp_path, mesh):
    name = 'model.layers.0.mlp.up_proj.weight'
    size = 8 if code == 'F64' else 1
    tensors = random_tensors(CFG) | {name: (code, (64, 32), bytes(64 * 32 * size)),
                                     f'{name}_scale_inv': np.ones((1, 1), ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=f'{name} is stored as {code}.*bfloat16, float16 or float32'):
        load_hf(tmp_path_with(tmp_path, CFG, tensors), CFG, mesh)


def test_scales_without_codes_are_refused(tmp_path, mesh):
    name = 'model.layers.0.mlp.up_proj.weight_scale_inv'
    tensors = random_tensors(CFG) | {name: np.ones((1, 1), ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=f'no place for: {name}'):
        load_hf(tmp_path_with(tmp_path, CFG, tensors), CFG, mesh)


def test_float_dtypes_and_mixtures_are_the_same_model(tmp_path, mesh):
    exact = random_tensors(CFG)  # bfloat16 values of this size are exact in float16 but for its subnormals
    exact = {name: np.where(np.abs(x.astype(np.float32)) < 1e-4, 0, x.astype(np.float32)) for name, x in exact.items()}
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    folders = {kind.__name__: {name: x.astype(kind) for name, x in exact.items()} for kind in kinds}
    folders['mixed'] = {name: x.astype(kinds[i % 3]) for i, (name, x) in enumerate(exact.items())}
    for kind, tensors in folders.items():
        write_folder(tmp_path / kind, CFG, tensors)
        assert stored_dtype(tmp_path / kind) == ('float32' if kind == 'mixed' else kind)
        for param_dtype in ('float32', 'bfloat16'):
            model = load_hf(tmp_path / kind, dataclasses.replace(CFG, param_dtype=param_dtype), mesh)
            np.testing.assert_array_equal(model.layers.mlp.w_up[0].T, exact['model.layers.0.mlp.up_proj.weight'])
            assert model.embed.dtype == param_dtype


@pytest.mark.parametrize('value', [1e5, 3.4e38])
def test_overflow_is_reported_and_leaves_nothing_behind(value, tmp_path, mesh):
    cfg = dataclasses.replace(CFG, param_dtype='float32')
    tensors = random_tensors(cfg, 'float32')
    tensors['model.layers.1.mlp.down_proj.weight'][3, 5] = value
    folder = tmp_path_with(tmp_path, cfg, tensors)
    model = load_hf(folder, cfg, mesh)
    if value > 1e38:
        with pytest.raises(ValueError, match=r'layers.1.mlp.down_proj.weight has values that bfloat16 cannot hold'):
            load_hf(folder, CFG, mesh)
    with pytest.raises(ValueError, match=r'model.layers.1.mlp.down_proj.weight has values that float16 cannot hold'):
        save_hf(model, tmp_path / 'out', dtype='float16')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf']


def test_export_in_another_dtype(tmp_path, mesh):
    source = write_folder(tmp_path / 'hf', CFG, torch_dtype='bfloat16')
    model = load_hf(tmp_path / 'hf', dataclasses.replace(CFG, param_dtype='float32'), mesh)
    for dtype in ('float32', 'float16', 'bfloat16'):
        save_hf(model, tmp_path / dtype, files=tmp_path / 'hf', dtype=dtype)
        assert_same(tensors_of(tmp_path / dtype), {name: x.astype(dtype) for name, x in source.items()})
        assert read_config(tmp_path / dtype) == {**read_config(tmp_path / 'hf'), 'torch_dtype': dtype}
        assert verify_hf(model, tmp_path / dtype) == len(source)
    with pytest.raises(ValueError, match="cannot be written as 'float8'; choose one of float32, float16, bfloat16"):
        save_hf(model, tmp_path / 'float8', dtype='float8')


# Export


def test_a_folder_that_is_not_empty_is_refused(tmp_path, mesh):
    model = load_hf(tmp_path_with(tmp_path, CFG), CFG, mesh)
    with pytest.raises(ValueError, match='already exists and is not empty'):
        save_hf(model, tmp_path / 'hf')
    (tmp_path / 'empty').mkdir()
    save_hf(model, tmp_path / 'empty')
    assert verify_hf(model, tmp_path / 'empty')


def test_a_killed_export_leaves_no_folder_and_the_next_one_succeeds(tmp_path, mesh, monkeypatch):
    model = load_hf(tmp_path_with(tmp_path, CFG), CFG, mesh)
    (tmp_path / '.out.incomplete').mkdir()
    (tmp_path / '.out.incomplete' / 'model.safetensors').write_bytes(b'half')
    seen = []

    def write(entry, blocks):
        seen.append(entry.file.parent.name)
        assert not (tmp_path / 'out').exists()
        original(entry, blocks)
        if len(seen) == 5:
            raise OSError(28, 'No space left on device')

    original = hf.write_tensor
    monkeypatch.setattr(hf, 'write_tensor', write)
    with pytest.raises(OSError, match='No space left'):
        save_hf(model, tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf']
    monkeypatch.setattr(hf, 'write_tensor', original)
    save_hf(model, tmp_path / 'out')
    assert verify_hf(model, tmp_path / 'out')


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, mesh, monkeypatch):
    model = load_hf(tmp_path_with(tmp_path, CFG), CFG, mesh)
    monkeypatch.setattr(hf.shutil, 'disk_usage', lambda path: collections.namedtuple('usage', 'free')(1000))
    with pytest.raises(ValueError, match=r'has 0.0 GB free, but the weights take'):
        save_hf(model, tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf']


def test_verify_sees_every_kind_of_difference(tmp_path, mesh):
    model = load_hf(tmp_path_with(tmp_path, CFG), CFG, mesh)
    save_hf(model, tmp_path / 'out', files=tmp_path / 'hf')
    file = tmp_path / 'out' / 'model.safetensors'
    good, entries = file.read_bytes(), read_folder(tmp_path / 'out')
    for name, entry in entries.items():  # one bit of the last entry of each tensor
        bad = bytearray(good)
        bad[entry.offset + entry.nbytes - 2] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=f'{name} differs from the model'):
            verify_hf(model, tmp_path / 'out')
    write_shard(file, {name: x for name, x in random_tensors(CFG).items() if name != 'model.norm.weight'})
    with pytest.raises(ValueError, match=r'model.norm.weight is missing'):
        verify_hf(model, tmp_path / 'out')
    write_shard(file, random_tensors(UNTIED))
    with pytest.raises(ValueError, match=r'lm_head.weight is not of this model'):
        verify_hf(model, tmp_path / 'out')
    file.write_bytes(good)
    config = tmp_path / 'out' / 'config.json'
    config.write_text(config.read_text().replace('1000000.0', '10000.0'))
    with pytest.raises(ValueError, match=r'config.json describes .*rope_theta=10000.0'):
        verify_hf(model, tmp_path / 'out')


def test_other_files_are_carried_over_whatever_they_are(tmp_path, mesh):
    folder = tmp_path_with(tmp_path, CFG)
    (tmp_path / 'blob').write_bytes(b'\0\1')
    (folder / 'tokenizer.model').symlink_to(tmp_path / 'blob')  # as in the hub's cache
    (folder / 'empty').write_bytes(b'')
    (folder / 'docs' / 'deep').mkdir()
    (folder / 'docs' / 'deep' / 'paper.pdf').write_bytes(bytes(range(256)))
    expected = other_files(folder)
    for stale in ('pytorch_model.bin', 'pytorch_model.bin.index.json', 'original.pth', 'docs/model.gguf',
                  '.git/objects', '.cache/huggingface/x'):
        (folder / stale).parent.mkdir(parents=True, exist_ok=True)
        (folder / stale).write_bytes(b'weights')
    save_hf(load_hf(folder, CFG, mesh), tmp_path / 'out', files=folder)
    assert other_files(tmp_path / 'out') == expected
    assert not (tmp_path / 'out' / 'tokenizer.model').is_symlink()


@pytest.mark.parametrize('target', ['.', 'nowhere'])
def test_links_that_cannot_be_carried_over_are_refused(target, tmp_path, mesh):
    folder = tmp_path_with(tmp_path, CFG)
    (folder / 'docs' / 'loop').symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match='loop is a link to a folder or to nothing'):
        save_hf(load_hf(folder, CFG, mesh), tmp_path / 'out', files=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf']


def test_a_model_from_scratch_brings_its_tokenizer_and_stop_ids(tmp_path, mesh):
    cfg, tokenizer = tiny_config('qwen3'), tiny_tokenizer()
    model = Transformer(cfg, jax.random.key(0))
    stops = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert json.loads(config_bytes(cfg, 'float32'))['model_type'] == 'qwen3'  # what a launcher asks before it trains
    save_hf(model, tmp_path / 'out', tokenizer=tokenizer, eos_ids=stops)
    assert verify_hf(model, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'generation_config.json').read_text()) == {'eos_token_id': list(stops)}
    assert read_config(tmp_path / 'out')['eos_token_id'] == list(stops)
    import transformers

    read = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'out')
    assert read.encode('1+1<|im_end|>') == tokenizer.encode('1+1<|im_end|>')
    with pytest.raises(ValueError, match='Hugging Face has no qwen3'):
        config_bytes(tiny_config('qwen3', qk_norm=False), 'float32')
