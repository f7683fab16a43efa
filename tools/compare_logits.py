"""A Hugging Face folder in our decoder and in transformers + torch: orbax_to_hf.py --verify ends with it."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np

from qedjax.checkpoint.hf import load_hf
from qedjax.model.hf_config import from_hf, read_config
from qedjax.sharding import MeshConfig, make_mesh

TOLERANCE = 1e-3  # of the largest logit, float32 on both sides


def verify_logits(folder: str | os.PathLike, up_to: float) -> None:
    """Prints how far logits differ, or why they were not compared: no torch, or more than `up_to` parameters.

    Raises ValueError if they differ by more than rounding.
    """
    count = from_hf(read_config(folder)).num_params
    if not importlib.util.find_spec('torch'):
        print('logits not compared with transformers: torch is not installed')
    elif count > up_to:
        print(f'logits not compared with transformers: {count / 1e9:.1f} billion parameters take {count * 8 / 1e9:.0f} GB '
              'of memory in float32, ours and theirs; raise --logits_up_to to compare them all the same')
    else:
        error = logits_error(folder)
        print(f'logits differ from those of transformers by at most {error:.1e} of the largest')
        if not error < TOLERANCE:
            raise ValueError(f'{folder} is another model in transformers: logits differ by {error:.1e} of the largest')


def logits_error(folder: str | os.PathLike, length: int = 64) -> float:
    """Largest difference of our logits from those of transformers, in float32, on random ids, over the largest."""
    import torch  # optional: everything else does without
    from transformers import AutoModelForCausalLM

    cfg = from_hf(read_config(folder), param_dtype='float32', dtype='float32', remat='none')
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, min(length, cfg.max_positions)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        positions = jnp.arange(tokens.shape[1])[None]
        ours = np.asarray(_logits(load_hf(folder, cfg, mesh), jnp.asarray(tokens, jnp.int32), positions))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = reference(torch.from_numpy(tokens)).logits.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@jax.jit
def _logits(model, tokens, positions):
    return model.logits(model(tokens, positions, jnp.ones_like(tokens)))
