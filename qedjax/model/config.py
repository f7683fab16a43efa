"""The decoder's configuration: one dataclass for the Qwen3, Qwen2 and Llama families. Sizes of published models are in presets.py."""

import dataclasses

FAMILIES = ('qwen3', 'qwen2', 'llama')
ROPE_KINDS = ('default', 'linear', 'yarn', 'llama3')
REMAT_POLICIES = ('none', 'dots', 'attention', 'full')
ATTENTION_BACKENDS = ('xla', 'splash', 'cudnn')
PAGED_BACKENDS = ('xla', 'ragged')
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pre-training.

    Attributes:
      kind: 'default' (no scaling), 'linear' (Chen et al. 2023), 'yarn' (Peng et al. 2023), 'llama3' (Llama 3.1).
      factor: extension factor.
      original_positions: positions of pre-training (yarn, llama3).
      beta_fast, beta_slow: rotations that bound yarn's ramp.
      attention_factor: yarn's factor on cos and sin; None is 0.1 ln(factor) + 1.
      truncate: yarn rounds the ramp's bounds to whole dimensions.
      low_freq_factor, high_freq_factor: llama3's band.
    """

    kind: str = 'default'
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """A decoder of RMSNorm, grouped-query attention with rotary positions and a gated SiLU mlp.

    Attributes:
      family: 'qwen3', 'qwen2' or 'llama': names the Hugging Face architecture that weights come from and go to.
      vocab_size: rows V of the embedding, padded rows included.
      embed_dim, mlp_dim, num_layers, num_heads, num_kv_heads, head_dim: D, F, L, N, K, H. N * H need not equal D.
      qk_norm: RMSNorm over H on queries and keys before the rotation (Qwen3).
      qkv_bias: bias on the query, key and value projections (Qwen2).
      output_bias: bias on the attention's output projection (Llama with attention_bias).
      tie_embeddings: the LM head is the embedding.
      rope_theta, rope_scaling: rotary base and scaling.
      norm_eps: epsilon of every RMSNorm.
      max_positions: longest row that the model is meant for; SFT and the sampler refuse longer ones.
      init_std: standard deviation of fresh weights.
      param_dtype: dtype of the parameters ('float32' masters or 'bfloat16').
      dtype: dtype of activations and matrix products; products of the LM head always accumulate in float32.
      attention: backend, see attention.py.
      attention_block: positions a block of the xla backend.
      paged_attention: backend of attention to the cache when sampling: 'xla' anywhere, 'ragged' on TPUs.
      remat: what the backward pass recomputes: 'none', 'dots' (keeps matrix products and the attention's output), 'attention' (keeps the
        attention's output), 'full' (keeps the layer's input alone).
    """

    family: str = 'qwen3'
    vocab_size: int = 151_936
    embed_dim: int = 2560
    mlp_dim: int = 9728
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 1e6
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    norm_eps: float = 1e-6
    max_positions: int = 40_960
    init_std: float = 0.02
    param_dtype: str = 'float32'
    dtype: str = 'bfloat16'
    attention: str = 'xla'
    attention_block: int = 256
    paged_attention: str = 'xla'
    remat: str = 'full'

    @property
    def num_params(self) -> int:
        """Number of parameters, the tied head counted once."""
        d, f, h = self.embed_dim, self.mlp_dim, self.head_dim
        queries, keys = self.num_heads * h, self.num_kv_heads * h
        layer = d * (2 * queries + 2 * keys) + 3 * d * f + 2 * d
        layer += 2 * h * self.qk_norm + (queries + 2 * keys) * self.qkv_bias + d * self.output_bias
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of forward and backward for one token of a causal row of `length` positions (attention halved, no remat)."""
        matmul = self.num_params - (0 if self.tie_embeddings else self.vocab_size * self.embed_dim)
        return 6 * matmul + 6 * self.num_layers * self.num_heads * self.head_dim * length


def validate(cfg: ModelConfig) -> None:
    """Raises ValueError, in one sentence, for a configuration that cannot be built."""
    for field, choices in (('family', FAMILIES), ('remat', REMAT_POLICIES), ('attention', ATTENTION_BACKENDS),
                           ('paged_attention', PAGED_BACKENDS), ('dtype', DTYPES), ('param_dtype', DTYPES)):
        if getattr(cfg, field) not in choices:
            raise ValueError(f'model.{field} is {getattr(cfg, field)!r}; choose one of {", ".join(choices)}')
    if cfg.rope_scaling.kind not in ROPE_KINDS:
        raise ValueError(f'model.rope_scaling.kind is {cfg.rope_scaling.kind!r}; choose one of {", ".join(ROPE_KINDS)}')
    if cfg.rope_scaling.kind in ('yarn', 'llama3') and cfg.rope_scaling.original_positions < 1:
        raise ValueError(f'rope scaling {cfg.rope_scaling.kind!r} needs original_positions, the length of pre-training')
    for field in ('vocab_size', 'embed_dim', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'max_positions',
                  'attention_block'):
        if getattr(cfg, field) < 1:
            raise ValueError(f'model.{field} must be at least 1, not {getattr(cfg, field)}')
    if cfg.num_heads % cfg.num_kv_heads:
        raise ValueError(f'model.num_heads={cfg.num_heads} is not a multiple of model.num_kv_heads={cfg.num_kv_heads}')
    if cfg.head_dim % 2:
        raise ValueError(f'model.head_dim={cfg.head_dim} must be even for rotary positions')
