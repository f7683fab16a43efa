"""Folders that transformers (4 or 5) writes and reads: import and export against it, live, in float32."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qedjax.checkpoint.hf import load_hf, save_hf, verify_hf
from qedjax.checkpoint.safetensors_io import INDEX, read_folder
from qedjax.model.config import RopeScaling
from qedjax.model.hf_config import from_hf, read_config
from qedjax.testing import tiny_config

torch = pytest.importorskip('torch')
import torch_reference
import transformers

pytestmark = pytest.mark.parity
OURS = {'param_dtype': 'float32', 'dtype': 'float32', 'attention_block': 16, 'remat': 'none'}
LONG = {'num_layers': 1, 'max_positions': 4096}
CASES = {
    'qwen3': tiny_config('qwen3'),
    'qwen3_untied': tiny_config('qwen3', tie_embeddings=False, norm_eps=1e-5),
    'qwen3_biases': tiny_config('qwen3', qkv_bias=True, output_bias=True),
    'qwen2': tiny_config('qwen2'),
    'qwen2_untied': tiny_config('qwen2', tie_embeddings=False),
    'llama': tiny_config('llama', rope_theta=1e4),
    'llama_biases': tiny_config('llama', qkv_bias=True, output_bias=True, tie_embeddings=True),
    'linear': tiny_config('llama', rope_scaling=RopeScaling('linear', 4.0), **LONG),
    'yarn': tiny_config('qwen3', rope_scaling=RopeScaling('yarn', 4.0, 1024), **LONG),
    'yarn_options': tiny_config('qwen2', rope_scaling=RopeScaling(
        'yarn', 4.0, 1024, beta_fast=24.0, beta_slow=2.0, attention_factor=1.3, truncate=False), **LONG),
    'llama3': tiny_config('llama', rope_scaling=RopeScaling('llama3', 8.0, 512), **LONG),
}
TOKENS = np.random.default_rng(0).integers(0, 320, 24)
POSITIONS = np.arange(24) * 40 + 7  # where a wrong theta or scaling shows


def ours(model) -> np.ndarray:
    tokens, positions = jnp.asarray(TOKENS, jnp.int32)[None], jnp.asarray(POSITIONS, jnp.int32)[None]
    return np.asarray(jax.jit(lambda m: m.logits(m(tokens, positions, jnp.ones_like(tokens))))(model)[0])


def theirs(model) -> np.ndarray:
    tokens, positions = torch.tensor(TOKENS)[None], torch.tensor(POSITIONS)[None]
    with torch.no_grad():
        out = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False)
    return out.logits[0].numpy()


def reload(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()


def torch_config(cfg):
    """The configuration of `cfg`, in the layout of the transformers that is installed."""
    config = torch_reference.hf_config(cfg)
    if transformers.__version__.startswith('4.'):
        rope = config.rope_parameters
        del config.rope_parameters
        config.rope_theta = rope.pop('rope_theta')
        config.rope_scaling = None if rope['rope_type'] == 'default' else rope
    return config


def random_torch_model(cfg):
    """Weights far from their initial values, so that no scale or bias is trivial."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(torch_config(cfg), attn_implementation='eager')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if 'norm' in name else 0.0, 0.3)
    return model.float().eval()


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize('case', CASES)
def test_import_and_export_keep_the_function(case, tmp_path, mesh):
    cfg, model = CASES[case], random_torch_model(CASES[case])
    expected = theirs(model)
    model.save_pretrained(tmp_path / 'theirs', max_shard_size='60KB')
    assert (tmp_path / 'theirs' / INDEX).exists()
    read = from_hf(read_config(tmp_path / 'theirs'), **OURS)
    assert read == cfg
    imported = load_hf(tmp_path / 'theirs', read, mesh)
    assert error(ours(imported), expected) < 1e-4
    # With the source's config, edited or not, and with a fresh one that both major versions of transformers must read.
    save_hf(imported, tmp_path / 'with_source', files=tmp_path / 'theirs')
    save_hf(imported, tmp_path / 'fresh', max_shard_bytes=60_000)
    for name in ('with_source', 'fresh'):
        exported = reload(tmp_path / name)
        assert exported.config.tie_word_embeddings == cfg.tie_embeddings
        np.testing.assert_array_equal(theirs(exported), expected)
        assert verify_hf(imported, tmp_path / name) == len(read_folder(tmp_path / 'theirs'))
    assert (tmp_path / 'with_source' / 'config.json').read_bytes() == (tmp_path / 'theirs' / 'config.json').read_bytes()


def test_mistral_without_its_window_is_a_llama(tmp_path, mesh):
    config = transformers.MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, sliding_window=None, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    model.save_pretrained(tmp_path / 'theirs')
    imported = load_hf(tmp_path / 'theirs', from_hf(read_config(tmp_path / 'theirs'), **OURS), mesh)
    assert error(ours(imported), theirs(model)) < 1e-4
    save_hf(imported, tmp_path / 'ours', files=tmp_path / 'theirs')
    exported = reload(tmp_path / 'ours')
    assert isinstance(exported, transformers.MistralForCausalLM)
    np.testing.assert_array_equal(theirs(exported), theirs(model))


@pytest.mark.parametrize('case', ['qwen3', 'llama'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_folders(case, dtype, tmp_path, mesh):
    model = random_torch_model(CASES[case])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    # A copy, since conversion would round the rotary frequencies too.
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(tmp_path / 'theirs')
    imported = load_hf(tmp_path / 'theirs', CASES[case], mesh)
    assert error(ours(imported), theirs(model)) < 1e-4
    save_hf(imported, tmp_path / 'ours', files=tmp_path / 'theirs', dtype=dtype)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', dtype='auto')
    assert exported.dtype == getattr(torch, dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name].float(), value), name


def test_stop_ids_of_a_fresh_export_are_those_that_transformers_stops_at(tmp_path, mesh):
    model = random_torch_model(CASES['llama'])
    model.save_pretrained(tmp_path / 'theirs')
    imported = load_hf(tmp_path / 'theirs', CASES['llama'], mesh)
    save_hf(imported, tmp_path / 'ours', eos_ids=(17, 300))
    assert json.loads((tmp_path / 'ours' / 'generation_config.json').read_text())['eos_token_id'] == [17, 300]
    exported = reload(tmp_path / 'ours')
    assert exported.generation_config.eos_token_id == [17, 300]
    assert exported.config.eos_token_id == [17, 300]
