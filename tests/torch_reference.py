"""The transformers side of reference.py: models and gradients under this project's names, as numpy arrays. Needs torch.

The weight mapping is written independently of checkpoint/hf.py on purpose.
"""

import numpy as np
import torch
import transformers
from reference import Document, named

from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer

# Ours (layers.* are stacked) -> Hugging Face, which transposes the kernels of linear layers and stores the rest alike.
NAMES = {
    'embed': 'model.embed_tokens.weight',
    'lm_head': 'lm_head.weight',
    'final_norm': 'model.norm.weight',
    'layers.attn_norm': 'model.layers.{}.input_layernorm.weight',
    'layers.mlp_norm': 'model.layers.{}.post_attention_layernorm.weight',
    'layers.attn.wq': 'model.layers.{}.self_attn.q_proj.weight',
    'layers.attn.wk': 'model.layers.{}.self_attn.k_proj.weight',
    'layers.attn.wv': 'model.layers.{}.self_attn.v_proj.weight',
    'layers.attn.wo': 'model.layers.{}.self_attn.o_proj.weight',
    'layers.attn.bq': 'model.layers.{}.self_attn.q_proj.bias',
    'layers.attn.bk': 'model.layers.{}.self_attn.k_proj.bias',
    'layers.attn.bv': 'model.layers.{}.self_attn.v_proj.bias',
    'layers.attn.bo': 'model.layers.{}.self_attn.o_proj.bias',
    'layers.attn.q_norm': 'model.layers.{}.self_attn.q_norm.weight',
    'layers.attn.k_norm': 'model.layers.{}.self_attn.k_norm.weight',
    'layers.mlp.w_gate': 'model.layers.{}.mlp.gate_proj.weight',
    'layers.mlp.w_up': 'model.layers.{}.mlp.up_proj.weight',
    'layers.mlp.w_down': 'model.layers.{}.mlp.down_proj.weight',
}
# Hugging Face -> ours.
FIELDS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'head_dim': 'head_dim',
    'rms_norm_eps': 'norm_eps',
    'max_position_embeddings': 'max_positions',
    'tie_word_embeddings': 'tie_embeddings',
}


def hf_config(cfg: ModelConfig):
    """The transformers configuration of the same architecture."""
    scaling = cfg.rope_scaling
    rope = {'rope_type': scaling.kind, 'rope_theta': cfg.rope_theta}
    if scaling.kind != 'default':
        rope['factor'] = scaling.factor
    if scaling.kind in ('yarn', 'llama3'):
        rope['original_max_position_embeddings'] = scaling.original_positions
    if scaling.kind == 'yarn':
        rope |= {key: getattr(scaling, key) for key in ('beta_fast', 'beta_slow', 'attention_factor', 'truncate')}
    if scaling.kind == 'llama3':
        rope |= {key: getattr(scaling, key) for key in ('low_freq_factor', 'high_freq_factor')}
    kinds = {'qwen3': transformers.Qwen3Config, 'qwen2': transformers.Qwen2Config, 'llama': transformers.LlamaConfig}
    bias = {} if cfg.family == 'qwen2' else {'attention_bias': cfg.qkv_bias}
    fields = {theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()}
    return kinds[cfg.family](**fields, **bias, rope_parameters=rope)


def build(model: Transformer):
    """The transformers model in float32 with eager attention and these weights, none left out on either side."""
    make = transformers.AutoModelForCausalLM.from_config
    theirs = make(hf_config(model.cfg), attn_implementation='eager', dtype=torch.float32).eval()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in named(model).items():
            for key, part in _per_layer(name, value):
                target = parameters.pop(key)
                part = part.reshape(target.shape[::-1]).T if _is_kernel(name) else part.reshape(target.shape)
                target.copy_(torch.tensor(part))
    assert not parameters, f'not covered: {sorted(parameters)}'
    return theirs


def load(folder):
    """The transformers model of a folder, in float32 with eager attention."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    return read(folder, attn_implementation='eager', dtype=torch.float32).eval()


def _is_kernel(name: str) -> bool:
    return name.rpartition('.')[2].startswith('w')


def _per_layer(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(Hugging Face key, tensor) of every layer of one of our parameters."""
    if not name.startswith('layers.'):
        return [(NAMES[name], value)]
    return [(NAMES[name].format(layer), part) for layer, part in enumerate(value)]


def evaluate(theirs, model: Transformer, documents: list[Document]):
    """Sum of weighted cross entropies, logits [T, V] of each document run by itself, and gradients under our names."""
    total, logits = 0.0, []
    for doc in documents:
        tokens, positions = (torch.tensor(x)[None] for x in (doc.tokens, doc.positions))
        # The mask says one document: without it transformers reads gaps between positions as document boundaries.
        out = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(out[:-1], tokens[0, 1:], reduction='none')
        total += (losses * torch.tensor(doc.weights[:-1])).sum()
        logits.append(out.detach().numpy())
    theirs.zero_grad()
    total.backward()
    return total.item(), logits, _gradients(theirs, model)


def _gradients(theirs, model: Transformer) -> dict[str, np.ndarray]:
    parameters = dict(theirs.named_parameters())

    def ours(name, value):
        parts = []
        for key, part in _per_layer(name, value):
            gradient = parameters[key].grad.numpy()
            parts.append((gradient.T if _is_kernel(name) else gradient).reshape(part.shape))
        return np.stack(parts) if name.startswith('layers.') else parts[0]

    return {name: ours(name, value) for name, value in named(model).items()}


@torch.no_grad()
def logits_at(theirs, tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Logits [len(seen), V] of one row of consecutive positions."""
    return theirs(torch.tensor(tokens)[None], logits_to_keep=torch.tensor(seen), use_cache=False).logits[0].numpy()


@torch.no_grad()
def states(theirs, doc: Document) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Inputs [1, T, D] of each layer, and keys and values [1, T, K, H] as each layer caches them."""
    tokens, positions = (torch.tensor(x)[None] for x in (doc.tokens, doc.positions))
    out = theirs(tokens, position_ids=positions, output_hidden_states=True, use_cache=True)
    cached = out.past_key_values.layers
    keys, values = ([getattr(layer, name).numpy().swapaxes(1, 2) for layer in cached] for name in ('keys', 'values'))
    return [x.numpy() for x in out.hidden_states[:-1]], keys, values


def greedy(theirs, prompt: np.ndarray, count: int) -> list[int]:
    """`count` greedy ids, whatever they are."""
    theirs.generation_config.eos_token_id = None
    tokens = torch.tensor(prompt)[None]
    out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt):].tolist()
