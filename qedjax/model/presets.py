"""Sizes of published models, as functions that return a fresh ModelConfig."""

import dataclasses

from qedjax.model.config import ModelConfig


def qwen3_0_6b() -> ModelConfig:
    return ModelConfig(embed_dim=1024, mlp_dim=3072, num_layers=28, num_heads=16)


def qwen3_1_7b() -> ModelConfig:
    return ModelConfig(embed_dim=2048, mlp_dim=6144, num_layers=28, num_heads=16)


def qwen3_4b() -> ModelConfig:
    return ModelConfig(embed_dim=2560, mlp_dim=9728, num_layers=36, num_heads=32)


def qwen3_8b() -> ModelConfig:
    return ModelConfig(embed_dim=4096, mlp_dim=12_288, num_layers=36, num_heads=32, tie_embeddings=False)


def qwen3_14b() -> ModelConfig:
    return ModelConfig(embed_dim=5120, mlp_dim=17_408, num_layers=40, num_heads=40, tie_embeddings=False)


def qwen3_32b() -> ModelConfig:
    return ModelConfig(embed_dim=5120, mlp_dim=25_600, num_layers=64, num_heads=64, tie_embeddings=False)


def qwen3_4b_2507() -> ModelConfig:
    """Qwen3-4B-Thinking-2507 and Qwen3-4B-Instruct-2507: the 4B with rope theta 5e6 and 262,144 positions."""
    return dataclasses.replace(qwen3_4b(), rope_theta=5e6, max_positions=262_144)


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M(-Instruct): a Llama of 30 layers."""
    return ModelConfig(family='llama', vocab_size=49_152, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9, num_kv_heads=3,
                       head_dim=64, qk_norm=False, rope_theta=1e5, norm_eps=1e-5, max_positions=8192)
