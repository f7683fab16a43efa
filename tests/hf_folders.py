"""Hugging Face folders of random weights for tests, with names, shapes and file format spelt out a second time."""

import json
import pathlib

import ml_dtypes
import numpy as np

from qedjax.checkpoint.safetensors_io import read_folder
from qedjax.model.config import ModelConfig
from qedjax.model.hf_config import to_hf

CODES = {np.dtype(np.float32): 'F32', np.dtype(np.float16): 'F16', np.dtype(ml_dtypes.bfloat16): 'BF16'}


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a folder."""
    D, F, V = cfg.embed_dim, cfg.mlp_dim, cfg.vocab_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = {'input_layernorm.weight': (D,), 'self_attn.q_proj.weight': (q, D), 'self_attn.k_proj.weight': (kv, D),
             'self_attn.v_proj.weight': (kv, D), 'self_attn.o_proj.weight': (D, q),
             'post_attention_layernorm.weight': (D,),
             'mlp.gate_proj.weight': (F, D), 'mlp.up_proj.weight': (F, D), 'mlp.down_proj.weight': (D, F)}
    if cfg.qk_norm:
        layer |= {'self_attn.q_norm.weight': (cfg.head_dim,), 'self_attn.k_norm.weight': (cfg.head_dim,)}
    if cfg.qkv_bias:
        layer |= {'self_attn.q_proj.bias': (q,), 'self_attn.k_proj.bias': (kv,), 'self_attn.v_proj.bias': (kv,)}
    if cfg.output_bias:
        layer |= {'self_attn.o_proj.bias': (D,)}
    out = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
    out |= {f'model.layers.{i}.{name}': shape for i in range(cfg.num_layers) for name, shape in layer.items()}
    return out if cfg.tie_embeddings else out | {'lm_head.weight': (V, D)}


def random_tensors(cfg: ModelConfig, dtype='bfloat16', seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype
    return {name: (0.1 * rng.standard_normal(shape, np.float32)).astype(dtype)
            for name, shape in shapes(cfg).items()}


def write_shard(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file; a value may also be (dtype code, shape, bytes)."""
    header, data = {}, b''
    for name, x in tensors.items():
        code, shape, raw = (CODES[x.dtype], x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x
        header[name] = {'dtype': code, 'shape': shape, 'data_offsets': [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def write_folder(folder: pathlib.Path, cfg: ModelConfig, tensors: dict[str, np.ndarray] | None = None, shards: int = 1,
                 **config) -> dict[str, np.ndarray]:
    """A folder with config.json (`config` replaces fields) and a few files as hubs have them. Returns its tensors."""
    tensors = random_tensors(cfg) if tensors is None else tensors
    (folder / 'docs').mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(to_hf(cfg, 'bfloat16') | config))  # not as an export formats it
    (folder / 'generation_config.json').write_text('{"eos_token_id": [151645, 151643]}')
    (folder / 'chat_template.jinja').write_bytes(b'{{ messages }}\r\n\xc3\xa9')
    (folder / 'docs' / 'LICENSE').write_text('all yours\n')
    if shards == 1:
        write_shard(folder / 'model.safetensors', tensors)
        return tensors
    weight_map = {name: f'model-{i % shards + 1:05d}-of-{shards:05d}.safetensors' for i, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        write_shard(folder / shard, {name: x for name, x in tensors.items() if weight_map[name] == shard})
    total = sum(x.nbytes for x in tensors.values())
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return tensors


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.array(entry.view()) for name, entry in read_folder(folder).items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(value.view(np.uint8), right[name].view(np.uint8), err_msg=name)
