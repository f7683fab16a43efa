"""Every field of the configuration does what it says: the logits move with the fields that matter and with no other."""

import dataclasses

import jax
import numpy as np
import pytest
import reference

from qedjax.model import presets
from qedjax.model.config import ModelConfig, RopeScaling, validate
from qedjax.model.rope import rope_frequencies
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, abstract, create, make_mesh
from qedjax.testing import tiny_config

LINEAR = RopeScaling('linear', factor=4.0)
BASE = tiny_config('qwen3', num_layers=1, qkv_bias=True, output_bias=True, attention_block=64)
# field -> (another value, whether logits of the same weights must change). A field without an entry fails a test below.
FIELDS = {
    'family': ('llama', False),
    'vocab_size': (336, True),
    'embed_dim': (48, True),
    'mlp_dim': (96, True),
    'num_layers': (2, True),
    'num_heads': (4, True),
    'num_kv_heads': (2, True),
    'head_dim': (16, True),
    'qk_norm': (False, True),
    'qkv_bias': (False, True),
    'output_bias': (False, True),
    'tie_embeddings': (False, True),
    'rope_theta': (1e4, True),
    'rope_scaling': (LINEAR, True),
    'norm_eps': (1e-4, True),
    'max_positions': (8192, False),
    'init_std': (0.1, False),
    'param_dtype': ('bfloat16', True),
    'dtype': ('bfloat16', True),
    'attention': ('splash', False),
    'paged_attention': ('ragged', False),
    'attention_block': (8, False),
    'remat': ('full', False),
}
SCALINGS = {
    'default': RopeScaling(),
    'linear': LINEAR,
    'yarn': RopeScaling('yarn', factor=4.0, original_positions=2048),
    'llama3': RopeScaling('llama3', factor=8.0, original_positions=1024),
}
# field -> (another value, kinds whose frequencies it must change); those of other kinds must not move.
SCALING_FIELDS = {
    'factor': (16.0, {'linear', 'yarn', 'llama3'}),
    'original_positions': (512, {'yarn', 'llama3'}),
    'beta_fast': (16.0, {'yarn'}),
    'beta_slow': (3.0, {'yarn'}),
    'attention_factor': (1.3, {'yarn'}),
    'truncate': (False, {'yarn'}),
    'low_freq_factor': (2.0, {'llama3'}),
    'high_freq_factor': (8.0, {'llama3'}),
}


@pytest.fixture(scope='module')
def base_logits():
    return logits_of(BASE)


def logits_of(cfg: ModelConfig) -> np.ndarray:
    """Of weights that depend on their names alone, at positions far apart."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        batch = reference.pack([[reference.document(BASE, 24, 'config', span=4096)]], 32)
        logits = jax.jit(reference.loss_and_logits)(reference.seeded_model(cfg), batch)[1]
    return np.asarray(logits)[:, :24]


def test_every_field_has_an_entry():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert SCALING_FIELDS.keys() | {'kind'} == {field.name for field in dataclasses.fields(RopeScaling)}


@pytest.mark.parametrize('field', FIELDS)
def test_logits_change_with_the_fields_that_matter_and_no_other(field, base_logits):
    value, matters = FIELDS[field]
    assert value != getattr(BASE, field)
    logits = logits_of(dataclasses.replace(BASE, **{field: value}))
    if matters:
        assert logits.shape != base_logits.shape or reference.error(logits, base_logits) > 1e-4
    else:
        assert reference.error(logits, base_logits) < 1e-5


def frequencies(scaling: RopeScaling) -> np.ndarray:
    inverse, factor = rope_frequencies(tiny_config(head_dim=128, rope_scaling=scaling))
    return np.append(inverse, factor)


@pytest.mark.parametrize('kind', SCALINGS)
@pytest.mark.parametrize('field', SCALING_FIELDS)
def test_frequencies_change_with_the_scaling_fields_that_matter_and_no_other(kind, field):
    value, kinds = SCALING_FIELDS[field]
    change = frequencies(dataclasses.replace(SCALINGS[kind], **{field: value})) / frequencies(SCALINGS[kind]) - 1
    assert (np.abs(change).max() > 1e-3) == (kind in kinds)
    assert kind in kinds or not change.any()


def test_kinds_of_scaling_differ():
    same = [frequencies(dataclasses.replace(SCALINGS['llama3'], kind=kind)) for kind in SCALINGS]
    for i, one in enumerate(same):
        assert all(np.abs(one / other - 1).max() > 1e-3 for other in same[:i])


@pytest.mark.parametrize(('change', 'message'), [
    ({'family': 'gpt'}, "model.family is 'gpt'; choose one of qwen3, qwen2, llama"),
    ({'remat': 'some'}, "model.remat is 'some'; choose one of none, dots, attention, full"),
    ({'attention': 'flash'}, "model.attention is 'flash'; choose one of xla, splash, cudnn"),
    ({'paged_attention': 'splash'}, "model.paged_attention is 'splash'; choose one of xla, ragged"),
    ({'dtype': 'float16'}, "model.dtype is 'float16'; choose one of float32, bfloat16"),
    ({'param_dtype': 'int8'}, "model.param_dtype is 'int8'"),
    ({'rope_scaling': RopeScaling('dynamic')}, "kind is 'dynamic'; choose one of default, linear, yarn, llama3"),
    ({'rope_scaling': RopeScaling('yarn', factor=4.0)}, "'yarn' needs original_positions"),
    ({'num_layers': 0}, 'model.num_layers must be at least 1, not 0'),
    ({'attention_block': -1}, 'model.attention_block must be at least 1, not -1'),
    ({'num_heads': 6}, 'model.num_heads=6 is not a multiple of model.num_kv_heads=4'),
    ({'head_dim': 7}, 'model.head_dim=7 must be even'),
])
def test_what_cannot_be_built_is_refused_in_one_sentence(change, message, mesh):
    cfg = dataclasses.replace(tiny_config(), **change)
    for refuse in (validate, lambda cfg: Transformer(cfg, jax.random.key(0))):
        with pytest.raises(ValueError, match=message):
            refuse(cfg)


# config.json of the published models: hidden size, mlp, layers, heads, kv heads, head_dim, tied; then their parameters.
PUBLISHED = {
    'qwen3_0_6b': ((1024, 3072, 28, 16, 8, 128, True), 596_049_920),
    'qwen3_1_7b': ((2048, 6144, 28, 16, 8, 128, True), 1_720_574_976),
    'qwen3_4b': ((2560, 9728, 36, 32, 8, 128, True), 4_022_468_096),
    'qwen3_4b_2507': ((2560, 9728, 36, 32, 8, 128, True), 4_022_468_096),
    'qwen3_8b': ((4096, 12_288, 36, 32, 8, 128, False), 8_190_735_360),
    'qwen3_14b': ((5120, 17_408, 40, 40, 8, 128, False), 14_768_307_200),
    'qwen3_32b': ((5120, 25_600, 64, 64, 8, 128, False), 32_762_123_264),
    'smollm2_135m': ((576, 1536, 30, 9, 3, 64, True), 134_515_008),
}


def count_parameters(cfg: ModelConfig, mesh) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)))


@pytest.mark.parametrize('name', PUBLISHED)
def test_presets_are_the_published_models(name, mesh):
    cfg = getattr(presets, name)()
    sizes, parameters = PUBLISHED[name]
    assert sizes == (cfg.embed_dim, cfg.mlp_dim, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim,
                     cfg.tie_embeddings)
    theta, positions = {'qwen3_4b_2507': (5e6, 262_144), 'smollm2_135m': (1e5, 8192)}.get(name, (1e6, 40_960))
    assert (cfg.rope_theta, cfg.max_positions, cfg.rope_scaling) == (theta, positions, RopeScaling())
    qwen = name.startswith('qwen3')
    assert (cfg.family, cfg.vocab_size, cfg.norm_eps, cfg.qk_norm, cfg.qkv_bias, cfg.output_bias) == (
        ('qwen3', 151_936, 1e-6, True, False, False) if qwen else ('llama', 49_152, 1e-5, False, False, False))
    assert cfg.num_params == parameters == count_parameters(cfg, mesh)


def test_every_preset_is_checked():
    assert PUBLISHED.keys() == {name for name, value in vars(presets).items() if callable(value) and name.islower()}


@pytest.mark.parametrize('cfg', reference.SHORT.values(), ids=reference.SHORT)
def test_parameters_are_counted_for_every_family(cfg, mesh):
    assert cfg.num_params == count_parameters(cfg, mesh)


@pytest.mark.parametrize('tied', [True, False])
def test_flops_are_three_times_those_of_the_compilers_forward_pass(tied, mesh):
    """One layer, whose attention the compiler does not halve; what is not a matrix product counts for little."""
    cfg = tiny_config(embed_dim=256, mlp_dim=512, head_dim=32, num_layers=1, tie_embeddings=tied, attention_block=128)
    model = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
    rows = [jax.ShapeDtypeStruct((1, 128), np.int32)] * 3
    lowered = jax.jit(lambda model, *rows: model.logits(model(*rows))).lower(model, *rows)
    attention_half = 2 * cfg.num_heads * cfg.head_dim * 128
    flops = lowered.cost_analysis()['flops'] / 128
    np.testing.assert_allclose(flops, cfg.flops_per_token(128) / 3 + attention_half, rtol=0.05)


def test_fresh_weights_have_the_standard_deviation_asked_for(mesh):
    model = create(lambda: Transformer(tiny_config(init_std=0.3, tie_embeddings=False), jax.random.key(0)), mesh)
    matrices = [leaf for name, leaf in reference.named(model).items() if not name.endswith('norm')]
    assert len(matrices) == 9
    for leaf in matrices:
        assert leaf.std() == pytest.approx(0.3, rel=0.05)
        assert abs(leaf.mean()) < 0.03
