"""The decoder as a typed pytree: an nnx.Module holds parameters and nothing else; plain jax transforms do the rest.

Letters: B batch rows, T positions, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers.
Layers are stacked [L, ...] by vmap over keys and run by lax.scan, so compile time does not grow with depth.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qedjax.model.attention import attend_cache, attend_packed, plan_cache
from qedjax.model.cache import PagedCache
from qedjax.model.config import ModelConfig, validate
from qedjax.model.embedding import lookup
from qedjax.model.rope import apply_rope, rope_angles
from qedjax.sharding import axis_size, spec

# attend(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> (output [B,T,N,H], whatever the caller threads through the layers)
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, PagedCache | None]]


def param(cfg: ModelConfig, key: jax.Array, shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
    """A normal weight whose dimensions have these logical axes; created in its own sharding. Raises ValueError if it cannot be split."""
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % axis_size(axis):
            raise ValueError(f'the {axis} axis has {size} entries, which {axis_size(axis)} devices cannot share evenly; '
                             f'make the mesh axis {spec(axis)[0]!r} a divisor of {size}')
    init = nnx.initializers.normal(cfg.init_std)
    return nnx.Param(init(key, shape, jnp.dtype(cfg.param_dtype), out_sharding=spec(*axes)))


def constant(cfg: ModelConfig, value: float, shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
    """A norm's scale (ones) or a bias (zeros)."""
    return nnx.Param(jnp.full(shape, value, jnp.dtype(cfg.param_dtype), out_sharding=spec(*axes)))


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """RMSNorm over the last axis (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale[...].astype(x.dtype) * normed.astype(x.dtype)


def linear(x: jax.Array, weight: nnx.Param, inputs: tuple[str | None, ...], outputs: tuple[str | None, ...]) -> jax.Array:
    """x [B, T, *inputs] times weight [*inputs, *outputs]: [B, T, *outputs]. The tuples hold logical axes.

    Rows and positions are merged where no device splits the positions: the weight's gradient then contracts one dimension instead of
    two, for which XLA on CPUs would copy an operand into another layout (half as slow again).
    """
    w, (B, T) = weight[...].astype(x.dtype), x.shape[:2]
    if axis_size('sequence') > 1:
        return jnp.tensordot(x, w, len(inputs), out_sharding=spec('batch', 'sequence', *outputs))
    rows = jax.reshard(x, spec('batch', None, *inputs)).reshape(B * T, *x.shape[2:], out_sharding=spec('batch', *inputs))
    y = jnp.tensordot(rows, w, len(inputs), out_sharding=spec('batch', *outputs))
    return jax.reshard(y.reshape(B, T, *y.shape[1:], out_sharding=spec('batch', None, *outputs)), spec('batch', 'sequence', *outputs))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; biases and qk-norm by config."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        keys = jax.random.split(key, 4)
        self.cfg = cfg
        self.wq = param(cfg, keys[0], (D, N, H), 'embed', 'heads', None)
        self.wk = param(cfg, keys[1], (D, K, H), 'embed', 'kv_heads', None)
        self.wv = param(cfg, keys[2], (D, K, H), 'embed', 'kv_heads', None)
        self.wo = param(cfg, keys[3], (N, H, D), 'heads', None, 'embed')
        self.bq = constant(cfg, 0, (N, H), 'heads', None) if cfg.qkv_bias else None
        self.bk = constant(cfg, 0, (K, H), 'kv_heads', None) if cfg.qkv_bias else None
        self.bv = constant(cfg, 0, (K, H), 'kv_heads', None) if cfg.qkv_bias else None
        self.bo = constant(cfg, 0, (D,), None) if cfg.output_bias else None
        self.q_norm = constant(cfg, 1, (H,), None) if cfg.qk_norm else None
        self.k_norm = constant(cfg, 1, (H,), None) if cfg.qk_norm else None

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: AttendFn):
        """x [B, T, D] -> (output [B, T, D], what `attend` threads through)."""
        cfg, dtype = self.cfg, x.dtype

        def project(weight, bias, heads):
            y = linear(x, weight, (None,), (heads, None))
            return y if bias is None else y + bias[...].astype(dtype)

        q = project(self.wq, self.bq, 'heads')
        k, v = project(self.wk, self.bk, 'kv_heads'), project(self.wv, self.bv, 'kv_heads')
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, cfg.norm_eps), rms_norm(k, self.k_norm, cfg.norm_eps)
        out, state = attend(apply_rope(q, angles), apply_rope(k, angles), v)
        out = linear(out, self.wo, ('heads', None), (None,))
        return out if self.bo is None else out + self.bo[...].astype(dtype), state


class MLP(nnx.Module):
    """Gated SiLU (SwiGLU, Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.w_gate = param(cfg, keys[0], (cfg.embed_dim, cfg.mlp_dim), 'embed', 'mlp')
        self.w_up = param(cfg, keys[1], (cfg.embed_dim, cfg.mlp_dim), 'embed', 'mlp')
        self.w_down = param(cfg, keys[2], (cfg.mlp_dim, cfg.embed_dim), 'mlp', 'embed')

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = linear(x, self.w_gate, (None,), ('mlp',)), linear(x, self.w_up, (None,), ('mlp',))
        return linear(jax.nn.silu(gate) * up, self.w_down, ('mlp',), (None,))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.cfg = cfg
        self.attn_norm = constant(cfg, 1, (cfg.embed_dim,), None)
        self.attn = Attention(cfg, attention_key)
        self.mlp_norm = constant(cfg, 1, (cfg.embed_dim,), None)
        self.mlp = MLP(cfg, mlp_key)

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: AttendFn):
        with jax.named_scope('attention'):
            out, state = self.attn(rms_norm(x, self.attn_norm, self.cfg.norm_eps), angles, attend)
        x = x + out
        with jax.named_scope('mlp'):
            return x + self.mlp(rms_norm(x, self.mlp_norm, self.cfg.norm_eps)), state


class Transformer(nnx.Module):
    """Embedding, L stacked blocks, final norm and head. Build under `jax.set_mesh`, best inside jit: sharded at birth."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        validate(cfg)
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed = param(cfg, embed_key, (cfg.vocab_size, cfg.embed_dim), 'vocab', 'embed')
        self.layers = jax.vmap(lambda k: Block(cfg, k))(jax.random.split(layers_key, cfg.num_layers))
        self.final_norm = constant(cfg, 1, (cfg.embed_dim,), None)
        self.lm_head = None if cfg.tie_embeddings else param(cfg, head_key, (cfg.vocab_size, cfg.embed_dim), 'vocab', 'embed')

    @property
    def head(self) -> jax.Array:
        """LM-head weight [V, D]: the embedding where tied."""
        return (self.embed if self.lm_head is None else self.lm_head)[...]

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows; tokens, positions and segment_ids are int32 [B, T] (see TrainBatch)."""
        cfg, angles = self.cfg, self._angles(positions)

        def attend(q, k, v):
            return attend_packed(q, k, v, segment_ids, cfg), None

        def body(x, layer):
            return layer(x, angles, attend)

        x, _ = jax.lax.scan(rematerialize(body, cfg.remat), self._embed(tokens), self.layers)
        return rms_norm(x, self.final_norm, cfg.norm_eps)

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: PagedCache, table: jax.Array) -> tuple[jax.Array, PagedCache]:
        """Final hidden states [B, T, D] of tokens at `positions` [B, T], written to the cache before they attend to it."""
        positions, table = jax.reshard(positions, spec('batch', 'sequence')), jax.reshard(table, spec('batch', None))
        angles, work = self._angles(positions), plan_cache(cache, table, positions)

        def body(carry, layer_and_index):
            (x, cache), (layer, index) = carry, layer_and_index

            def attend(q, k, v):
                return attend_cache(q, k, v, cache, index, table, positions, work)

            return layer(x, angles, attend), None

        layers = (self.layers, jnp.arange(self.cfg.num_layers))
        (x, cache), _ = jax.lax.scan(body, (self._embed(tokens), cache), layers)
        return rms_norm(x, self.final_norm, self.cfg.norm_eps), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of final hidden states. For sampling and tests: training uses train/lm_head.py."""
        head = self.head.astype(x.dtype)
        return jnp.einsum('BTD,VD->BTV', x, head, preferred_element_type=jnp.float32,
                          out_sharding=spec('batch', None, 'vocab'))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return lookup(self.embed[...], tokens, self.cfg.dtype)

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_angles(self.cfg, positions)


def rematerialize(body: Callable, policy: str) -> Callable:
    """Wraps a layer function so that its backward pass recomputes what `policy` does not keep (see ModelConfig.remat)."""
    policies = jax.checkpoint_policies
    if policy == 'none':
        return body
    attention = policies.save_only_these_names('attention')
    keep = {'full': policies.nothing_saveable, 'attention': attention,
            'dots': policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)}[policy]
    return jax.checkpoint(body, policy=keep)
