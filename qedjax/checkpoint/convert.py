"""Whole conversions: a Hugging Face folder to a checkpoint of ours, and back.

A checkpoint is laid out like a training workdir (checkpoints/0, hf_files), so that whatever takes a run takes it too.
Results are written under another name and get their own last: a failure leaves nothing behind that looks finished.
"""

import dataclasses
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import tqdm
from absl import logging

from qedjax.checkpoint import manager
from qedjax.checkpoint.hf import check_target, copy_other_files, load_hf, save_hf, stored_dtype, verify_hf
from qedjax.checkpoint.hf_names import match
from qedjax.checkpoint.load import HF_FILES, files_folder, load_model, load_tokenizer, saved_config
from qedjax.checkpoint.safetensors_io import read_folder
from qedjax.data.chat import stop_ids
from qedjax.model.config import DTYPES
from qedjax.model.hf_config import from_hf, read_config
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, make_mesh


def hf_to_orbax(hf: str | os.PathLike, orbax: str | os.PathLike, dtype: str | None = None) -> None:
    """Writes the model of a Hugging Face folder as orbax/checkpoints/0, and the folder's other files to orbax/hf_files.

    Args:
      hf: what to read: config.json, safetensors and any other files.
      orbax: must not exist, or be empty.
      dtype: 'float32' or 'bfloat16'; the folder's own by default (float32, which loses nothing, for float16, mixtures).

    Raises ValueError for anything that does not fit, before anything is written.
    """
    orbax = pathlib.Path(orbax).absolute()
    check_target(orbax)
    config, stored = read_config(hf), stored_dtype(hf)
    cfg = from_hf(config, param_dtype=dtype or (stored if stored in DTYPES else 'float32'))
    _require_space(orbax, cfg.num_params * jnp.dtype(cfg.param_dtype).itemsize)
    partial = orbax.with_name(f'.{orbax.name}.incomplete')
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with _bar('reading', sum(entry.nbytes for entry in read_folder(hf).values())) as bar:
            model = load_hf(hf, cfg, _one_device(), bar.update)
        copy_other_files(hf, partial / HF_FILES)
        logging.info('writing %s', orbax)
        manager.save_tree(partial / 'checkpoints' / '0', {'model': model}, {'model': dataclasses.asdict(cfg)})
        if orbax.exists():
            orbax.rmdir()
        partial.rename(orbax)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def orbax_to_hf(orbax: str | os.PathLike, hf: str | os.PathLike, *, dtype: str | None = None,
                files: str | os.PathLike | None = None, verify: bool = False) -> None:
    """Writes the model of a checkpoint of ours as a Hugging Face folder.

    Args:
      orbax: a run's workdir, its checkpoints folder, or one step.
      hf: must not exist, or be empty.
      dtype: 'float32', 'bfloat16' or 'float16'; by default that of the checkpoint's parameters.
      files: folder whose files other than weights are carried over; by default the run's hf_files.
      verify: reopen the result and compare every tensor with the checkpoint.

    Raises ValueError for anything that does not fit, before anything is written, and if the result is another model.
    """
    check_target(hf)
    cfg = saved_config(orbax)
    files = files or files_folder(orbax)
    if files and not pathlib.Path(files).is_dir():
        raise ValueError(f'{files} is not a folder; --files names one whose tokenizer and other files are carried over')
    if not files:
        logging.warning('%s has no %s: only weights and config.json are written; --files names others', orbax, HF_FILES)
    dtype = dtype or cfg.param_dtype
    narrow = dtype == 'bfloat16' and cfg.param_dtype != dtype
    if narrow:
        cfg = dataclasses.replace(cfg, param_dtype=dtype)  # half the memory that float32 parameters would take
    model = load_model(orbax, _one_device(), cfg)
    if narrow:
        _require_finite(orbax, model)
    total = cfg.num_params * jnp.dtype(dtype).itemsize
    with _bar('writing', total) as bar:
        save_hf(model, hf, files=files, eos_ids=_eos_ids(files), dtype=dtype, progress=bar.update)
    if verify:
        with _bar('verifying', total) as bar:
            count = verify_hf(model, hf, bar.update)
        print(f'{count} tensors are those of {orbax}')


def _require_finite(orbax: str | os.PathLike, model: Transformer) -> None:
    for weight, leaf in match(model):
        if not jnp.isfinite(leaf).all():
            raise ValueError(f'{orbax}: {weight.path} has values that are not finite in bfloat16; choose --dtype=float32')


def _eos_ids(files: str | os.PathLike | None) -> tuple[int, ...]:
    """Ids that end a generation where no file says so: a model trained from scratch has a tokenizer alone."""
    if not files or any(pathlib.Path(files, name).is_file() for name in ('config.json', 'generation_config.json')):
        return ()
    return stop_ids(load_tokenizer(files))


def _one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def _require_space(folder: pathlib.Path, size: int) -> None:
    place = next(parent for parent in folder.parents if parent.exists())
    if size > (free := shutil.disk_usage(place).free):
        raise ValueError(f'{place} has {free / 1e9:.1f} GB free, but the weights take {size / 1e9:.1f} GB')


def _bar(name: str, total: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc=name, unit='B', unit_scale=True, mininterval=1)
