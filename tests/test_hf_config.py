"""config.json to ModelConfig and back: every field honoured or refused."""

import dataclasses
import json
import logging

import hypothesis
import pytest
from hypothesis import strategies as st

from qedjax.model import presets
from qedjax.model.config import ModelConfig, RopeScaling
from qedjax.model.hf_config import OUR_FIELDS, from_hf, read_config, to_hf
from qedjax.testing import tiny_config

# As published, but for fields without meaning here.
QWEN3_4B_2507 = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 2560, 'initializer_range': 0.02,
    'intermediate_size': 9728, 'max_position_embeddings': 262144, 'max_window_layers': 36, 'model_type': 'qwen3',
    'num_attention_heads': 32, 'num_hidden_layers': 36, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-06,
    'rope_scaling': None, 'rope_theta': 5000000, 'sliding_window': None, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False,
    'vocab_size': 151936,
}
QWEN2_1_5B = {
    'architectures': ['Qwen2ForCausalLM'], 'hidden_act': 'silu', 'hidden_size': 1536, 'intermediate_size': 8960,
    'max_position_embeddings': 32768, 'max_window_layers': 21, 'model_type': 'qwen2', 'num_attention_heads': 12,
    'num_hidden_layers': 28, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0,
    'sliding_window': 32768, 'tie_word_embeddings': True, 'use_sliding_window': False, 'vocab_size': 151936,
}
SMOLLM2_135M = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 576,
    'initializer_range': 0.041666666666666664, 'intermediate_size': 1536, 'is_llama_config': True,
    'max_position_embeddings': 8192, 'mlp_bias': False, 'model_type': 'llama', 'num_attention_heads': 9,
    'num_hidden_layers': 30, 'num_key_value_heads': 3, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
    'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
    'transformers.js_config': {'kv_cache_dtype': {}}, 'vocab_size': 49152,
}
MISTRAL = {
    'architectures': ['MistralForCausalLM'], 'model_type': 'mistral', 'hidden_size': 4096, 'intermediate_size': 14336,
    'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'max_position_embeddings': 32768,
    'rms_norm_eps': 1e-05, 'rope_theta': 1e6, 'sliding_window': None, 'vocab_size': 32768,
}
BASE = to_hf(tiny_config(), 'float32')
CASES = {
    'qwen3': tiny_config('qwen3'),
    'qwen3 with biases': tiny_config('qwen3', qkv_bias=True, output_bias=True, tie_embeddings=False),
    'qwen2': tiny_config('qwen2', norm_eps=1e-5),
    'llama': tiny_config('llama', max_positions=77, init_std=0.1),
    'llama with biases': tiny_config('llama', qkv_bias=True, output_bias=True),
    'linear': tiny_config(rope_scaling=RopeScaling('linear', factor=4.0)),
    'yarn': tiny_config(rope_scaling=RopeScaling('yarn', factor=4.0, original_positions=1024)),
    'yarn with all fields': tiny_config(rope_scaling=RopeScaling(
        'yarn', 2.0, 2048, beta_fast=24.0, beta_slow=2.0, attention_factor=1.3, truncate=False)),

    'llama3': tiny_config('llama', rope_scaling=RopeScaling(
        'llama3', 8.0, 1024, low_freq_factor=1.5, high_freq_factor=5.0)),
}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_published_configs_are_the_presets():
    assert from_hf(QWEN3_4B_2507) == presets.qwen3_4b_2507()
    assert from_hf(SMOLLM2_135M) == dataclasses.replace(presets.smollm2_135m(), init_std=0.041666666666666664)
    assert from_hf(QWEN2_1_5B) == ModelConfig(
        'qwen2', embed_dim=1536, mlp_dim=8960, num_layers=28, num_heads=12, num_kv_heads=2, qk_norm=False,
        qkv_bias=True, max_positions=32768)
    assert from_hf(MISTRAL) == ModelConfig(
        'llama', 32768, 4096, 14336, 32, 32, 8, 128, qk_norm=False, tie_embeddings=False, norm_eps=1e-5,
        max_positions=32768)
    assert from_hf(without(MISTRAL, 'model_type')) == from_hf(MISTRAL)


def test_our_own_fields_are_arguments():
    assert from_hf(QWEN3_4B_2507, dtype='float32', remat='none').remat == 'none'
    with pytest.raises(ValueError, match='remat'):
        from_hf(QWEN3_4B_2507, remat='some')


@pytest.mark.parametrize('case', CASES)
def test_a_fresh_config_is_read_back_by_both_layouts(case):
    cfg = CASES[case]
    config = json.loads(json.dumps(to_hf(cfg, 'bfloat16', eos_ids=[7])))
    ours = {field: getattr(cfg, field) for field in OUR_FIELDS}
    assert config['torch_dtype'] == 'bfloat16'
    assert config['eos_token_id'] == 7
    for layout in (config, without(config, 'rope_parameters'), without(config, 'rope_theta', 'rope_scaling')):
        assert from_hf(layout, **ours) == cfg


SCALINGS = st.one_of(
    st.just(RopeScaling()),
    st.builds(RopeScaling, st.just('linear'), st.floats(1, 64)),
    st.builds(RopeScaling, st.just('yarn'), st.floats(1, 64), st.integers(1, 4000), st.floats(8, 64), st.floats(0.5, 4),
              st.none() | st.floats(0.5, 2), st.booleans()),
    st.builds(lambda *fields: RopeScaling('llama3', *fields[:2], low_freq_factor=fields[2], high_freq_factor=fields[3]),
              st.floats(1, 64), st.integers(1, 4000), st.floats(0.5, 2), st.floats(3, 8)),
)


@hypothesis.given(st.sampled_from(['qwen3', 'qwen2', 'llama']), st.booleans(), st.booleans(), SCALINGS,
                  st.floats(100, 1e8), st.sampled_from([1e-6, 1e-5]), st.integers(1, 64))
def test_any_model_survives_the_way_out_and_back(family, bias, tied, scaling, theta, eps, layers):
    biases = {} if family == 'qwen2' else {'qkv_bias': bias, 'output_bias': bias}
    cfg = tiny_config(family, tie_embeddings=tied, rope_scaling=scaling, rope_theta=theta, norm_eps=eps,
                      num_layers=layers, **biases)
    config = json.loads(json.dumps(to_hf(cfg, 'bfloat16')))
    ours = {field: getattr(cfg, field) for field in OUR_FIELDS}
    assert from_hf(config, **ours) == cfg
    assert to_hf(cfg, 'bfloat16', config) == config  # and as its own source nothing is edited


def test_every_field_of_the_function_is_written():
    """A field that were dropped on the way out would leave two configs alike."""
    cfg = tiny_config('llama')
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name not in OUR_FIELDS}
    changes = {name: 2 * value for name, value in fields.items() if type(value) in (int, float)}
    changes |= {'num_kv_heads': 2, 'tie_embeddings': True, 'rope_scaling': RopeScaling('linear', 2.0)}
    assert fields.keys() == changes.keys() | {'family', 'qk_norm', 'qkv_bias', 'output_bias'}  # the architecture
    for name, value in changes.items():
        assert to_hf(dataclasses.replace(cfg, **{name: value}), 'float32') != to_hf(cfg, 'float32'), name


# B05


def test_theta_in_any_place():
    theta = {'rope_theta': 1e6}
    bare = without(BASE, 'rope_theta', 'rope_parameters', 'rope_scaling')
    top = from_hf({**bare, **theta})
    assert top.rope_theta == 1e6
    assert from_hf({**bare, 'rope_parameters': {'rope_type': 'default', **theta}}) == top
    assert from_hf({**bare, **theta, 'rope_scaling': {'rope_type': 'default'}}) == top
    scaled = from_hf({**bare, **theta, 'rope_scaling': {'type': 'linear', 'factor': 2}})
    assert (scaled.rope_theta, scaled.rope_scaling) == (1e6, RopeScaling('linear', 2.0))


def test_no_theta_is_the_default_and_is_said(caplog):
    bare = without(BASE, 'rope_theta', 'rope_parameters', 'rope_scaling')
    with caplog.at_level(logging.WARNING):
        assert from_hf(bare).rope_theta == 10_000
    assert 'no rope_theta: 10000' in caplog.text


def test_rope_parameters_win_over_a_theta_that_differs(caplog):
    with caplog.at_level(logging.WARNING):
        assert from_hf({**BASE, 'rope_theta': 1e4}).rope_theta == 1e6
    assert 'rope_theta is 10000.0, but 1000000.0 in rope_parameters' in caplog.text


@pytest.mark.parametrize(('rope', 'words'), [
    ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}, "rope type 'dynamic'"),
    ({'rope_scaling': {'type': 'longrope'}}, "rope type 'longrope'"),
    ({'rope_scaling': {'type': 'mrope', 'mrope_section': [1]}}, "rope type 'mrope'"),
    ({'rope_parameters': {'rope_type': 'proportional'}}, "rope type 'proportional'"),
    ({'rope_parameters': {'rope_type': 'default', 'mrope_section': [1]}}, 'mrope_section'),
    ({'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'full_attention': {'rope_theta': 1e6}}}, 'full_attention layers'),

    ({'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'linear'}}, 'disagree on rope_type'),
    ({'rope_scaling': {'rope_type': 'linear'}}, "'linear' needs a number factor"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': '4'}}, "'yarn' needs a number factor"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0, 'high_freq_factor': 4.0}}, 'a number low_freq_factor'),
])
def test_rope_that_is_not_implemented_is_refused_by_name(rope, words):
    with pytest.raises(ValueError, match=words):
        from_hf({**without(BASE, 'rope_parameters', 'rope_scaling'), **rope})


def test_yarn_as_transformers_reads_it():
    def yarn(top=(), **fields):
        rope = {'rope_scaling': {'rope_type': 'yarn', **fields}}
        return from_hf({**without(BASE, 'rope_parameters'), **rope, **dict(top)}).rope_scaling

    key = 'original_max_position_embeddings'
    assert yarn(factor=4.0) == RopeScaling('yarn', 4.0, original_positions=4096)  # those of the model
    assert yarn(factor=4.0, **{key: 512}).original_positions == 512
    assert yarn({key: 256}, factor=4.0, **{key: 512}).original_positions == 256
    assert yarn(factor=None, **{key: 512}).factor == 8.0
    assert yarn(factor=4.0, beta_fast=None, beta_slow=None) == yarn(factor=4.0)
    weighted = yarn(factor=4.0, mscale=1.0, mscale_all_dim=0.8).attention_factor
    assert weighted == pytest.approx((1 + 0.1 * 1.3862943611) / (1 + 0.08 * 1.3862943611))
    assert yarn(factor=4.0, mscale=1.0).attention_factor is None
    assert yarn(factor=4.0, mscale=1.0, mscale_all_dim=0.8, attention_factor=1.5).attention_factor == 1.5


def test_yarn_switched_on_in_a_config_of_pre_training_lengthens_rows():
    """As the cards of Qwen2.5 and Qwen3 say to do it: max_position_embeddings stays what it was."""
    rope = {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}}
    cfg = from_hf({**QWEN2_1_5B, **rope})
    assert cfg.max_positions == 131_072
    assert to_hf(cfg, 'bfloat16', {**QWEN2_1_5B, **rope}) == {**QWEN2_1_5B, **rope}
    assert from_hf(to_hf(cfg, 'bfloat16')) == cfg
    assert from_hf({**QWEN2_1_5B, **rope, 'max_position_embeddings': 100_000}).max_positions == 100_000
    with pytest.raises(ValueError, match='in effect on 28 of 28'):  # a window of 32,768 now hides something
        from_hf({**QWEN2_1_5B, **rope, 'use_sliding_window': True, 'max_window_layers': 0})


# B07


@pytest.mark.parametrize('fields', [
    {'use_sliding_window': False, 'sliding_window': 8},
    {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 28},
    {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0, 'layer_types': ['full_attention'] * 2},
    {'use_sliding_window': True, 'sliding_window': None, 'max_window_layers': 0},
    {'use_sliding_window': True, 'sliding_window': 4096, 'max_window_layers': 0},  # hides nothing of 4,096 positions
])
def test_windows_that_are_switched_off_are_full_attention(fields):
    assert from_hf({**BASE, **fields}) == from_hf(BASE)


@pytest.mark.parametrize(('fields', 'layers'), [
    ({'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1}, '1 of 2'),

    ({'use_sliding_window': True, 'sliding_window': 8, 'layer_types': ['sliding_attention', 'full_attention']},
     '1 of 2'),
    ({'use_sliding_window': False, 'sliding_window': 8, 'layer_types': ['sliding_attention'] * 2}, '2 of 2'),
])
def test_windows_in_effect_are_refused(fields, layers):
    with pytest.raises(ValueError, match=f'in effect on {layers} layers'):
        from_hf({**BASE, **fields})


def test_windows_of_mistral():
    assert from_hf({**MISTRAL, 'sliding_window': 32768}) == from_hf(MISTRAL)
    with pytest.raises(ValueError, match='sliding_window=4096 is in effect on 32 of 32'):
        from_hf(without(MISTRAL, 'sliding_window'))  # 4,096 by default


# Everything else that changes the function


@pytest.mark.parametrize(('field', 'value'), [
    ('hidden_act', 'gelu'), ('mlp_bias', True), ('partial_rotary_factor', 0.5), ('rope_interleaved', True),
    ('no_rope_layers', [1, 0]), ('final_logit_softcapping', 30.0), ('attn_logit_softcapping', 50.0),
    ('logit_scale', 0.0625), ('logits_scaling', 8.0), ('embedding_multiplier', 12.0), ('residual_multiplier', 0.22),
    ('attention_multiplier', 0.015), ('query_pre_attn_scalar', 256), ('num_experts', 128), ('num_local_experts', 8),
    ('attention_chunk_size', 8192), ('layer_types', ['linear_attention', 'full_attention']),
    ('quantization_config', {'quant_method': 'fp8'}), ('compression_config', {'format': 'int4'}),
    ('architectures', ['Qwen3ForSequenceClassification']), ('model_type', 'gemma3'),
    ('auto_map', {'AutoModelForCausalLM': 'modeling.Own'}),
])
def test_what_is_not_implemented_is_refused_by_name(field, value):
    name = {'layer_types': 'linear_attention', 'architectures': 'Qwen3ForSequenceClassification'}.get(field, field)
    with pytest.raises(ValueError, match=name):
        from_hf({**BASE, field: value})
    if field not in ('hidden_act', 'architectures', 'model_type', 'auto_map'):
        assert from_hf({**BASE, field: None}) == from_hf(BASE)


def test_what_is_neutral_is_accepted():
    neutral = {'mlp_bias': False, 'partial_rotary_factor': 1.0, 'logits_scaling': 1.0, 'num_experts': 0,
               'hidden_act': 'swish', 'final_logit_softcapping': None, 'quantization_config': None, 'pretraining_tp': 1}
    assert from_hf({**BASE, **neutral}) == from_hf(BASE)


def test_unknown_fields_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        from_hf({**BASE, 'new_trick': 3})
    assert 'unknown fields are ignored: new_trick' in caplog.text
    caplog.clear()
    for config in (QWEN3_4B_2507, QWEN2_1_5B, SMOLLM2_135M, MISTRAL, BASE):
        from_hf(config)
    assert not caplog.text


def test_biases_of_each_family():
    llama = to_hf(tiny_config('llama'), 'float32') | {'attention_bias': True}
    for cfg in (from_hf(llama), from_hf(BASE | {'attention_bias': True})):
        assert (cfg.qkv_bias, cfg.output_bias) == (True, True)
    qwen2 = to_hf(tiny_config('qwen2'), 'float32')
    for value in (True, False):
        assert from_hf(qwen2 | {'attention_bias': value}) == from_hf(qwen2)
    with pytest.raises(ValueError, match='attention_bias'):
        from_hf(MISTRAL | {'attention_bias': True})


def test_sizes_left_out():
    assert from_hf(without(QWEN3_4B_2507, 'head_dim')).head_dim == 128
    assert from_hf(without(SMOLLM2_135M, 'num_key_value_heads')).num_kv_heads == 9
    bare = without(SMOLLM2_135M, 'max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings')
    defaults = {'max_positions': 2048, 'norm_eps': 1e-6, 'tie_embeddings': False}
    assert from_hf(bare) == dataclasses.replace(from_hf(SMOLLM2_135M), **defaults)
    with pytest.raises(ValueError, match='no vocab_size, hidden_size'):
        from_hf({'model_type': 'llama', 'intermediate_size': 1, 'num_hidden_layers': 1, 'num_attention_heads': 1})


# Export


def test_a_source_is_edited_only_where_the_weights_changed_it():
    for config in (QWEN3_4B_2507, QWEN2_1_5B, SMOLLM2_135M):
        cfg = from_hf(config)
        assert to_hf(cfg, 'bfloat16', config) == config
        assert list(to_hf(cfg, 'bfloat16', config)) == list(config)
    cfg = from_hf(QWEN3_4B_2507)
    assert to_hf(cfg, 'float32', QWEN3_4B_2507) == {**QWEN3_4B_2507, 'torch_dtype': 'float32'}
    assert to_hf(cfg, 'float16', {**without(QWEN3_4B_2507, 'torch_dtype'), 'dtype': 'float32'})['dtype'] == 'float16'


def test_a_config_that_was_changed_for_training_is_exported_as_trained():
    cfg = dataclasses.replace(from_hf(QWEN3_4B_2507), max_positions=2**20, norm_eps=1e-5,
                              rope_scaling=RopeScaling('yarn', 4.0, 262_144))
    config = to_hf(cfg, 'bfloat16', QWEN3_4B_2507)
    assert from_hf(config) == cfg
    same = without(QWEN3_4B_2507, 'max_position_embeddings', 'rope_scaling', 'rope_theta', 'rms_norm_eps')
    assert {key: config[key] for key in same} == same
    implicit = {**without(BASE, 'rope_parameters'), 'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}
    longer = dataclasses.replace(from_hf(implicit), max_positions=8192)  # of pre-training they stay 4,096
    assert from_hf(to_hf(longer, 'float32', implicit)) == longer


def test_a_source_that_is_another_model_is_replaced(caplog):
    cfg = tiny_config('qwen3')
    with caplog.at_level(logging.WARNING):
        assert to_hf(cfg, 'float32', QWEN3_4B_2507) == to_hf(cfg, 'float32')
        assert to_hf(cfg, 'float32', {'model_type': 'gemma3'}) == to_hf(cfg, 'float32')
    assert 'describes another model' in caplog.text
    assert 'gemma3' in caplog.text


@pytest.mark.parametrize('changes', [{'qk_norm': False}, {'qkv_bias': True}, {'family': 'llama'}, {'family': 'qwen2'},
                                     {'family': 'llama', 'qk_norm': False, 'embed_dim': 36}])
def test_models_without_a_hugging_face_architecture_are_refused(changes):
    with pytest.raises(ValueError, match=r'Hugging Face has no|transformers refuses'):
        to_hf(dataclasses.replace(tiny_config('qwen3'), **changes), 'float32')


def test_folders_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r'no config\.json'):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{"a": ')
    with pytest.raises(ValueError, match='not valid JSON'):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('[]')
    with pytest.raises(ValueError, match='must hold a JSON object, not a list'):
        read_config(tmp_path)
