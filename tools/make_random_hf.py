"""Writes a Hugging Face folder of random weights of a published size, tensor by tensor: no download to convert one.

python tools/make_random_hf.py --preset=qwen3_4b_2507 --hf=DIR [--tokenizer=DIR]
"""

import json
import pathlib
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import flags

from qedjax import cli
from qedjax.checkpoint.hf import SHARD_BYTES, check_target, copy_other_files
from qedjax.checkpoint.hf_names import torch_shapes
from qedjax.checkpoint.safetensors_io import Entry, create_folder, write_tensor
from qedjax.model import presets
from qedjax.model.hf_config import to_hf
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, abstract, make_mesh

PRESETS = [name for name in vars(presets) if name.startswith(('qwen', 'smollm'))]
PRESET = flags.DEFINE_enum('preset', None, PRESETS, 'Size of the model, a function of model/presets.py.', required=True)
HF = flags.DEFINE_string('hf', None, 'Folder to write; absent or empty.', required=True)
TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder whose files other than weights and config.json are copied.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the weights.')


def main(_) -> None:
    jax.config.update('jax_platforms', 'cpu')
    folder, cfg = pathlib.Path(HF.value), getattr(presets, PRESET.value)()
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = abstract(lambda: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    entries = create_folder(folder, torch_shapes(model), np.dtype(ml_dtypes.bfloat16), SHARD_BYTES)
    rng = np.random.default_rng(SEED.value)
    for name, entry in tqdm.tqdm(entries.items(), 'tensors', mininterval=1):
        write_tensor(entry, random_blocks(rng, entry, mean=float(name.endswith('norm.weight')), std=cfg.init_std))
    if TOKENIZER.value:
        copy_other_files(TOKENIZER.value, folder)
    (folder / 'config.json').write_text(json.dumps(to_hf(cfg, 'bfloat16'), indent=2) + '\n')


def random_blocks(rng: np.random.Generator, entry: Entry, mean: float, std: float) -> Iterator[np.ndarray]:
    """Normal values of one tensor, a few million at a time."""
    left = entry.nbytes // entry.dtype.itemsize
    while left:
        size = min(left, 2**22)
        yield (mean + std * rng.standard_normal(size, np.float32)).astype(entry.dtype)
        left -= size


if __name__ == '__main__':
    cli.run(main)
