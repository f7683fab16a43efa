"""qedjax: post-training of proof-writing language models in JAX (SFT, rubric-reward RL, the reasoning cache)."""

__version__ = '0.1.0'
