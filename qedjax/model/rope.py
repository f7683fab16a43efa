"""Rotary positions (Su et al. 2021, arXiv 2104.09864) with linear, yarn and llama3 scaling, in the rotate-half layout of Hugging Face."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qedjax.model.config import ModelConfig, RopeScaling


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] (radians a position, float32) and the factor on cos and sin.

    Periods are rounded to float32 before anything else is done to them, as in the code that published weights were trained with: at
    position 262,144 the last bit of a frequency is 0.02 radians.
    """
    half = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    inverse = 1 / (cfg.rope_theta**half).astype(np.float32)
    scaling, factor = cfg.rope_scaling, 1.0
    if scaling.kind == 'linear':
        inverse = inverse / scaling.factor
    elif scaling.kind == 'llama3':
        inverse = _llama3(inverse, scaling)
    elif scaling.kind == 'yarn':
        inverse, factor = _yarn(inverse, cfg)
    return inverse, factor


def _llama3(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, the band between interpolated (Llama 3.1's published code)."""
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_positions / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def _yarn(inverse: np.ndarray, cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """YaRN's NTK-by-parts (arXiv 2309.00071, section 3.2) and its attention factor (section 3.4)."""
    scaling = cfg.rope_scaling

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that makes this many rotations over the length of pre-training."""
        return cfg.head_dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    keep = 1 - np.clip((np.arange(cfg.head_dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return inverse / scaling.factor * (1 - keep) + inverse * keep, factor


def rope_angles(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H/2] in float32 for integer positions [B, T]."""
    inverse, factor = rope_frequencies(cfg)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, N, H] by angles [B, T, H/2]; computed in float32, returned in x's dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
