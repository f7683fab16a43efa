"""Hugging Face `config.json` to ModelConfig and back, in the layouts of transformers 4 and 5.

A field that changes the function is honoured or refused by name. What a file leaves out takes the default of its
transformers class.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from qedjax.model.config import ModelConfig, RopeScaling, validate

# model_type -> our family. Mistral without its sliding window is a Llama.
FAMILIES = {'qwen3': 'qwen3', 'qwen2': 'qwen2', 'llama': 'llama', 'mistral': 'llama'}
ARCHITECTURES = {'Qwen3ForCausalLM': 'qwen3', 'Qwen2ForCausalLM': 'qwen2', 'LlamaForCausalLM': 'llama',
                 'MistralForCausalLM': 'mistral'}
OUR_FIELDS = ('param_dtype', 'dtype', 'attention', 'attention_block', 'paged_attention', 'remat')  # that no config.json has
_CLASS_DEFAULTS = {
    'qwen3': {'num_key_value_heads': 32, 'head_dim': 128, 'max_position_embeddings': 32_768},
    'qwen2': {'num_key_value_heads': 32, 'max_position_embeddings': 32_768},
    'llama': {'max_position_embeddings': 2048},
    'mistral': {'num_key_value_heads': 8, 'max_position_embeddings': 131_072, 'sliding_window': 4096},
}
_DEFAULTS = {'rms_norm_eps': 1e-6, 'initializer_range': 0.02, 'tie_word_embeddings': False, 'hidden_act': 'silu',
             'max_window_layers': 28}
_DEFAULT_THETA = 10_000.0
_SIZES = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
# Fields of relatives that compute something else, each with the values at which they do not. None and absence always
# mean off.
_MUST_BE_OFF = {
    'mlp_bias': (False,), 'partial_rotary_factor': (1,), 'rope_interleaved': (False,), 'no_rope_layers': (),
    'attention_chunk_size': (), 'attn_logit_softcapping': (), 'final_logit_softcapping': (), 'logit_softcapping': (),
    'query_pre_attn_scalar': (), 'logit_scale': (1,), 'logits_scaling': (1,), 'embedding_multiplier': (1,),
    'residual_multiplier': (1,), 'attention_multiplier': (), 'num_experts': (0,), 'num_local_experts': (0,),
    'n_routed_experts': (0,), 'is_encoder_decoder': (False,), 'is_decoder': (False, True), 'use_qk_norm': (False,),
    'qk_layernorm': (False,), 'add_cross_attention': (False,), 'use_bidirectional_attention': (False,),
}
# Fields read below, and fields that say nothing about the function of a decoder without dropout; any other is warned
# of.
_READ = {
    'architectures', 'model_type', 'auto_map', 'num_key_value_heads', 'head_dim', 'max_position_embeddings',
    'attention_bias', 'rope_theta', 'rope_scaling', 'rope_parameters', 'original_max_position_embeddings',
    'use_sliding_window', 'sliding_window', 'layer_types', 'quantization_config', 'compression_config', *_DEFAULTS,
    *_SIZES, *_MUST_BE_OFF,
}
_HARMLESS = {
    'attention_dropout', 'bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id', 'pretraining_tp', 'use_cache', 'torch_dtype',
    'dtype', 'transformers_version', '_name_or_path', 'name_or_path', 'is_llama_config', 'transformers.js_config',
    'attn_implementation', '_attn_implementation', 'output_attentions', 'output_hidden_states', 'return_dict',
    'id2label', 'label2id', 'problem_type', 'chunk_size_feed_forward', 'task_specific_params', 'unsloth_fixed',
    'unsloth_version',
}
_ROPE_FIELDS = {
    'rope_type', 'type', 'rope_theta', 'factor', 'original_max_position_embeddings', 'attention_factor', 'beta_fast',
    'beta_slow', 'mscale', 'mscale_all_dim', 'truncate', 'low_freq_factor', 'high_freq_factor', 'partial_rotary_factor',
    'finetuned',
}


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a folder. Raises ValueError if either is not there, or it is no JSON object."""
    path = pathlib.Path(folder) / 'config.json'
    if not path.is_file():
        raise ValueError(f'{folder} is not a Hugging Face model folder: it has no config.json')
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); download it again') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold a JSON object, not a {type(config).__name__}')
    return config


def from_hf(config: Mapping[str, Any], **ours: Any) -> ModelConfig:
    """ModelConfig of a `config.json`; `ours` sets OUR_FIELDS, which it does not have.

    Raises ValueError that names the field for a model that this decoder cannot compute exactly.
    """
    model_type = _model_type(config)
    config = {**_DEFAULTS, **_CLASS_DEFAULTS[model_type], **config}
    if missing := [key for key in _SIZES if config.get(key) is None]:
        raise ValueError(f'config.json has no {", ".join(missing)}; it is not complete')
    _refuse(config, model_type)
    theta, scaling = _rope(config)
    positions = config['max_position_embeddings']
    if scaling.kind == 'yarn' and positions == scaling.original_positions:  # switched on, the rest left as pre-trained
        positions = round(scaling.factor * positions)
    _refuse_windows(config, model_type, positions)
    family, heads = FAMILIES[model_type], config['num_attention_heads']
    bias = bool(config.get('attention_bias')) and family != 'qwen2'  # Qwen2 has three biases, whatever the field says
    cfg = ModelConfig(
        family=family, vocab_size=config['vocab_size'], embed_dim=config['hidden_size'],
        mlp_dim=config['intermediate_size'], num_layers=config['num_hidden_layers'], num_heads=heads,
        num_kv_heads=config.get('num_key_value_heads') or heads,
        head_dim=config.get('head_dim') or config['hidden_size'] // heads, qk_norm=family == 'qwen3',
        qkv_bias=bias or family == 'qwen2', output_bias=bias, tie_embeddings=bool(config['tie_word_embeddings']),
        rope_theta=theta, rope_scaling=scaling, norm_eps=config['rms_norm_eps'], init_std=config['initializer_range'],
        max_positions=positions)
    cfg = dataclasses.replace(cfg, **ours)
    validate(cfg)
    return cfg


def _model_type(config: Mapping[str, Any]) -> str:
    names = config.get('architectures') or []
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise ValueError(f'config.json: architecture {unknown[0]} is not implemented; choose one of '
                         f'{", ".join(ARCHITECTURES)}')
    if 'AutoModelForCausalLM' in (config.get('auto_map') or {}):
        raise ValueError('config.json: auto_map names model code of its own, which is not implemented')
    model_type = config.get('model_type') or (ARCHITECTURES[names[0]] if names else None)
    if model_type not in FAMILIES:
        raise ValueError(f'config.json: model_type {model_type!r} is not implemented; choose one of '
                         f'{", ".join(FAMILIES)}')
    return model_type


def _refuse(config: Mapping[str, Any], model_type: str) -> None:
    """Raises for what changes the function and is not implemented; warns of fields that nobody here has heard of."""
    for key in ('quantization_config', 'compression_config'):
        if config.get(key):
            method = config[key].get('quant_method', 'unknown method')
            raise ValueError(f'config.json: {key} ({method}) is not implemented; use the unquantised checkpoint')
    if config['hidden_act'] not in ('silu', 'swish'):
        raise ValueError(f'config.json: hidden_act={config["hidden_act"]!r} is not implemented; only silu is')
    for key, off in _MUST_BE_OFF.items():
        if config.get(key) is not None and config[key] not in off:
            raise ValueError(f'config.json: {key}={config[key]!r} is not implemented')
    if model_type == 'mistral' and config.get('attention_bias'):
        raise ValueError('config.json: attention_bias is unknown to mistral; set model_type to llama if it has biases')
    if unknown := sorted(config.keys() - _READ - _HARMLESS):
        logging.warning('config.json: unknown fields are ignored: %s', ', '.join(unknown))


def _refuse_windows(config: Mapping[str, Any], model_type: str, positions: int) -> None:
    """Raises if a layer's attention is really cut to a window, by the rules of transformers."""
    window, layers, kinds = config.get('sliding_window'), config['num_hidden_layers'], config.get('layer_types')
    if model_type.startswith('qwen'):
        if not config.get('use_sliding_window'):
            window = None
        kinds = kinds or ['sliding_attention' if window and layer >= config['max_window_layers'] else 'full_attention'
                          for layer in range(layers)]
    if unknown := set(kinds or ()) - {'full_attention', 'sliding_attention'}:
        raise ValueError(f'config.json: layer type {min(unknown)!r} is not implemented')
    windowed = kinds.count('sliding_attention') if kinds is not None else layers if window else 0
    # A window as long as the longest row hides nothing.
    if windowed and not (window and window >= positions):
        raise ValueError(f'config.json: sliding_window={window} is in effect on {windowed} of {layers} layers, which '
                         'is not implemented; only full attention is')


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    new, old = config.get('rope_parameters') or {}, config.get('rope_scaling') or {}
    rope = {**new, **old}
    if differing := [key for key in sorted(new.keys() & old.keys()) if new[key] != old[key]]:
        raise ValueError(f'config.json: rope_parameters and rope_scaling disagree on {differing[0]}; delete one')
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f'config.json: rope_parameters of its own for {nested[0]} layers are not implemented')
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind not in _SCALINGS:
        raise ValueError(f'config.json: rope type {kind!r} is not implemented; choose one of {", ".join(_SCALINGS)}')
    if unknown := sorted(rope.keys() - _ROPE_FIELDS):
        raise ValueError(f'config.json: {unknown[0]} in rope_parameters is not implemented')
    if rope.get('partial_rotary_factor', 1) != 1:
        raise ValueError(f'config.json: partial_rotary_factor={rope["partial_rotary_factor"]} is not implemented')
    theta, top = rope.get('rope_theta'), config.get('rope_theta')
    if theta is not None and top is not None and theta != top:
        logging.warning('config.json: rope_theta is %s, but %s in rope_parameters, which wins as in transformers 5',
                        top, theta)
    theta = top if theta is None else theta
    if theta is None:
        theta = _DEFAULT_THETA
        logging.warning('config.json has no rope_theta: %s is used, the default of transformers', theta)
    return float(theta), _SCALINGS[kind](rope, config)


def _linear(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling('linear', factor=_number(rope, 'factor'))


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling('llama3', factor=_number(rope, 'factor'), original_positions=_original(rope, config),
                       low_freq_factor=_number(rope, 'low_freq_factor'),
                       high_freq_factor=_number(rope, 'high_freq_factor'))


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    original = _original(rope, config)
    if 'factor' in rope and rope['factor'] is None:
        rope = {**rope, 'factor': config['max_position_embeddings'] / original}
    scaling = RopeScaling('yarn', factor=_number(rope, 'factor'), original_positions=original,
                          beta_fast=float(rope.get('beta_fast') or 32), beta_slow=float(rope.get('beta_slow') or 1),
                          truncate=bool(rope.get('truncate', True)))
    factor, mscale, mscale_all_dim = (rope.get(key) for key in ('attention_factor', 'mscale', 'mscale_all_dim'))
    if factor is None and mscale and mscale_all_dim:
        factor = _mscale(scaling.factor, mscale) / _mscale(scaling.factor, mscale_all_dim)
    return dataclasses.replace(scaling, attention_factor=factor)


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's factor on cos and sin, weighted (DeepSeek-V2's published configuration)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALINGS = {'default': lambda rope, config: RopeScaling(), 'linear': _linear, 'yarn': _yarn, 'llama3': _llama3}


def _number(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float):
        kind = rope.get('rope_type') or rope['type']
        raise ValueError(f'config.json: rope type {kind!r} needs a number {key}, not {value!r}')
    return float(value)


def _original(rope: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Positions of pre-training: outside the rope fields (it wins), inside, or those of the model."""
    key = 'original_max_position_embeddings'
    return int(config.get(key) or rope.get(key) or config['max_position_embeddings'])


def to_hf(cfg: ModelConfig, dtype: str, source: Mapping[str, Any] | None = None,
          eos_ids: Sequence[int] = ()) -> dict[str, Any]:
    """`config.json` of exported weights.

    Args:
      cfg: the model.
      dtype: of the weights: 'float32', 'bfloat16' or 'float16'.
      source: config of the folder that the model came from. Only what `cfg` or `dtype` changed is edited in it. If it
        describes a model of other sizes (the tokenizer's folder of a model trained from scratch, say), it is left out
        of account.
      eos_ids: for a fresh config.

    Raises ValueError for a combination of fields that no Hugging Face architecture has.
    """
    fresh = _fresh(cfg, dtype, eos_ids)
    origin = _describes(source, cfg) if source else None
    if origin is None or source is None:
        return fresh
    config, key = dict(source), 'dtype' if 'dtype' in source else 'torch_dtype'
    if key in source and source[key] != dtype:
        config[key] = dtype
    for field, key in (('norm_eps', 'rms_norm_eps'), ('max_positions', 'max_position_embeddings')):
        if getattr(origin, field) != getattr(cfg, field):
            config[key] = fresh[key]
    # The source may leave the positions of pre-training to max_position_embeddings, which has just been edited.
    implicit = cfg.rope_scaling.kind != 'default' and origin.max_positions != cfg.max_positions
    if implicit or (origin.rope_theta, origin.rope_scaling) != (cfg.rope_theta, cfg.rope_scaling):
        for key in ('rope_theta', 'rope_parameters', 'rope_scaling', 'original_max_position_embeddings'):
            config.pop(key, None)
        config |= {key: fresh[key] for key in ('rope_theta', 'rope_parameters', 'rope_scaling')}
    return config


def _describes(source: Mapping[str, Any], cfg: ModelConfig) -> ModelConfig | None:
    """The config of `source` if it is one of a model with the weights of `cfg`."""
    try:
        origin = from_hf(source)
    except ValueError as error:
        logging.warning('the config.json of the source folder is replaced: %s', error)
        return None
    editable = ('rope_theta', 'rope_scaling', 'norm_eps', 'max_positions', 'init_std', *OUR_FIELDS)
    if dataclasses.replace(origin, **{field: getattr(cfg, field) for field in editable}) != cfg:
        logging.warning('the config.json of the source folder describes another model and is replaced')
        return None
    return origin


def _fresh(cfg: ModelConfig, dtype: str, eos_ids: Sequence[int]) -> dict[str, Any]:
    """A config that transformers 4 (top-level theta, rope_scaling) and 5 (rope_parameters) read alike."""
    if cfg.family == 'qwen2':
        expressible = (cfg.qk_norm, cfg.qkv_bias, cfg.output_bias) == (False, True, False)
    else:
        expressible = cfg.qk_norm == (cfg.family == 'qwen3') and cfg.qkv_bias == cfg.output_bias
    if not expressible:
        raise ValueError(f'Hugging Face has no {cfg.family} with qk_norm={cfg.qk_norm}, qkv_bias={cfg.qkv_bias}, '
                         f'output_bias={cfg.output_bias}; change the family or these fields')
    if cfg.family == 'llama' and cfg.embed_dim % cfg.num_heads:
        raise ValueError(f'transformers refuses a Llama whose embed_dim={cfg.embed_dim} is no multiple of '
                         f'num_heads={cfg.num_heads}')
    config = {
        'architectures': [next(name for name, family in ARCHITECTURES.items() if family == cfg.family)],
        'model_type': cfg.family, 'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed_dim,
        'intermediate_size': cfg.mlp_dim, 'num_hidden_layers': cfg.num_layers, 'num_attention_heads': cfg.num_heads,
        'num_key_value_heads': cfg.num_kv_heads, 'head_dim': cfg.head_dim, 'hidden_act': 'silu',
        'max_position_embeddings': cfg.max_positions, 'initializer_range': cfg.init_std, 'rms_norm_eps': cfg.norm_eps,
        'tie_word_embeddings': cfg.tie_embeddings, 'attention_dropout': 0.0, 'use_cache': True, 'torch_dtype': dtype,
        # Explicit: the Llama class would otherwise end at id 2.
        'bos_token_id': None, 'eos_token_id': eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
    }
    if cfg.family == 'qwen2':
        config |= {'use_sliding_window': False}
    else:
        config |= {'attention_bias': cfg.output_bias}
    scaling = _scaling_fields(cfg.rope_scaling)
    parameters = {'rope_theta': cfg.rope_theta, **(scaling or {'rope_type': 'default'})}
    return config | {'rope_theta': cfg.rope_theta, 'rope_scaling': scaling, 'rope_parameters': parameters}


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == 'default':
        return None
    fields = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind != 'linear':
        fields['original_max_position_embeddings'] = scaling.original_positions
    if scaling.kind == 'llama3':
        fields |= {key: getattr(scaling, key) for key in ('low_freq_factor', 'high_freq_factor')}
    if scaling.kind == 'yarn':
        fields |= {key: getattr(scaling, key) for key in ('beta_fast', 'beta_slow', 'truncate')}
        fields |= {} if scaling.attention_factor is None else {'attention_factor': scaling.attention_factor}
    return fields
