"""Weights from and to Hugging Face folders, every tensor accounted for both ways (names and layouts: hf_names.py).

Names, shapes, dtypes and file sizes are all checked, from headers, before anything is allocated or written. Import
gives each device only the bytes of its shard. Export writes into a temporary folder that gets its name last. Either way
the host holds one copy of the weights at most, and besides it one tensor of one layer.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qedjax.checkpoint.hf_names import Weight, match, tensors, torch_shapes
from qedjax.checkpoint.safetensors_io import (
    DTYPES,
    INDEX,
    Entry,
    create_folder,
    finish_folder,
    read_folder,
    write_tensor,
)
from qedjax.model.config import ModelConfig
from qedjax.model.hf_config import OUR_FIELDS, from_hf, read_config, to_hf
from qedjax.model.transformer import Transformer
from qedjax.sharding import abstract

SHARD_BYTES = 5e9
Progress = Callable[[int], object]  # is told the bytes of each piece read or written
# Weights in any format: never carried over, since they would be those of another model.
WEIGHT_SUFFIXES = ('.safetensors', INDEX, '.bin', '.bin.index.json', '.pth', '.pt', '.ckpt', '.gguf', '.msgpack', '.h5',
                   '.onnx', '.onnx_data')
CACHES = ('.git', '.cache')  # of the tools that download


# Import


def load_hf(folder: str | os.PathLike, cfg: ModelConfig, mesh: Mesh, progress: Progress | None = None) -> Transformer:
    """Reads the weights of a folder, sharded over `mesh` and in cfg.param_dtype.

    Float32, float16 and bfloat16 may be mixed in the folder. Raises ValueError, before anything is allocated, for a
    tensor that is missing, left over, misshapen, cut or of another dtype; and for one whose values overflow
    param_dtype.
    """
    entries = read_folder(folder)
    target = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
    _account(folder, cfg, entries, torch_shapes(target))
    leaves = [_load(weight, leaf, entries, progress) for weight, leaf in match(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def stored_dtype(folder: str | os.PathLike) -> str:
    """The narrowest dtype that holds a folder's weights exactly: their common one, or float32 if they are mixed."""
    dtypes = {entry.dtype.name for entry in read_folder(folder).values()}
    return dtypes.pop() if len(dtypes) == 1 else 'float32'


def _account(folder, cfg: ModelConfig, entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := [name for name in expected if name not in entries]:
        raise ValueError(f'{folder} lacks {len(missing)} of the tensors that its config.json calls for: '
                         f'{_some(missing)}')
    extra = [name for name in entries if name not in expected and not name.endswith('rotary_emb.inv_freq')]
    if cfg.tie_embeddings and 'lm_head.weight' in extra:
        if not _equal(entries['lm_head.weight'], entries['model.embed_tokens.weight']):
            raise ValueError(f'{folder}: lm_head.weight is not the embedding, although config.json says '
                             'tie_word_embeddings; set that to false to use this head, or delete the tensor')
        extra.remove('lm_head.weight')
    if extra:
        raise ValueError(f'{folder} has {len(extra)} tensors that this architecture has no place for: {_some(extra)}')
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise ValueError(f'{folder}: {name} has shape {entries[name].shape}, but config.json calls for {shape}')


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _equal(left: Entry, right: Entry) -> bool:
    a, b = left.view(), right.view()
    return a.shape == b.shape and all(np.array_equal(a[rows].astype(np.float32), b[rows].astype(np.float32))
                                      for rows in _blocks(a.shape))


def _load(weight: Weight, leaf: jax.ShapeDtypeStruct, entries: Mapping[str, Entry],
          progress: Progress | None) -> jax.Array:
    """One parameter. Each device's callback reads the part of the files that its shard needs."""
    names, apart = weight.names(leaf.shape), weight.split_shape(leaf.shape)

    def shard(index: Any) -> np.ndarray:
        sizes = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
        out = _aligned(sizes, leaf.dtype)
        layers, part = (index[0], index[1:]) if weight.stacked else (slice(None), index)
        for name, ours in zip(names[layers], out if weight.stacked else [out], strict=True):
            values = entries[name].view().reshape(apart)[tuple(part[axis] for axis in weight.order)]
            target = ours.transpose(weight.order)
            for rows in _blocks(values.shape):
                target[rows] = _cast(name, values[rows], leaf.dtype)
            if progress:
                progress(values.nbytes)
        return out

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, shard))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at a 64-byte boundary: the CPU backend takes it over instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Ranges of rows of about half a million entries: transposed and cast in cache, and no second copy of a tensor."""
    step = max(1, 2**19 // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over='ignore', invalid='ignore'):
        cast = values.astype(dtype)
        if jnp.finfo(dtype).max < jnp.finfo(values.dtype).max and not np.isfinite(cast.astype(np.float32)).all():
            raise ValueError(f'{name} has values that {np.dtype(dtype).name} cannot hold; choose another dtype')
    return cast


# Export


def save_hf(model: Transformer, folder: str | os.PathLike, *, files: str | os.PathLike | None = None, tokenizer=None,
            eos_ids: Sequence[int] = (), dtype: str | None = None, max_shard_bytes: float = SHARD_BYTES,
            progress: Progress | None = None) -> None:
    """Writes a model as a Hugging Face folder. On several hosts all call it, and the first writes.

    Args:
      folder: must not exist, or be empty.
      files: folder whose files other than weights (tokenizer, template, generation_config, licence, ...) are carried
        over byte for byte, and whose config.json is edited only where the weights or the config changed it.
      tokenizer: without files, the transformers tokenizer to save.
      eos_ids: without files, the ids that end a generation.
      dtype: of the weights: float32, bfloat16 or float16; param_dtype by default.
      max_shard_bytes: a new file is begun when a tensor would exceed it.
      progress: is told the bytes of each tensor written.

    Raises ValueError for a folder that is not empty, a disk that is too small, a model that Hugging Face has no
    architecture for, or values that overflow `dtype`; nothing is left behind then.
    """
    folder = pathlib.Path(folder).absolute()
    check_target(folder)
    config = config_bytes(model.cfg, dtype or model.cfg.param_dtype, files, eos_ids)
    stored = jnp.dtype(dtype or model.cfg.param_dtype)
    temporary = folder.with_name(f'.{folder.name}.incomplete')
    if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        entries = _prepare(temporary, torch_shapes(model), stored, max_shard_bytes) if jax.process_index() == 0 else {}
        for name, values in _torch_tensors(model):
            if entries:
                write_tensor(entries[name], (_cast(name, values[rows], stored) for rows in _blocks(values.shape)))
            if progress:
                progress(values.size * stored.itemsize)
        if entries:
            finish_folder(temporary, entries)
            _write_other_files(temporary, config, files, tokenizer, eos_ids)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('save_hf')


def check_target(folder: str | os.PathLike) -> None:
    """Raises ValueError unless a folder is absent or empty."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} already exists and is not empty; choose another folder or delete it')


def config_bytes(cfg: ModelConfig, dtype: str, files: str | os.PathLike | None = None,
                 eos_ids: Sequence[int] = ()) -> bytes:
    """`config.json` of an export: the bytes that `files` has where nothing in it changes.

    Raises ValueError if a model of this config cannot be exported: a launcher can ask before it trains.
    """
    choices = [known.name for known in DTYPES.values()]
    if dtype not in choices:
        raise ValueError(f'weights cannot be written as {dtype!r}; choose one of {", ".join(choices)}')
    path = pathlib.Path(files, 'config.json') if files else None
    old = read_config(path.parent) if path and path.is_file() else None
    new = to_hf(cfg, dtype, old, eos_ids)
    return path.read_bytes() if path and new == old else (json.dumps(new, indent=2) + '\n').encode()


def _prepare(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype,
             max_shard_bytes: float) -> dict[str, Entry]:
    folder.mkdir(parents=True)
    size, free = sum(map(math.prod, shapes.values())) * dtype.itemsize, shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f'{folder.parent} has {free / 1e9:.1f} GB free, but the weights take {size / 1e9:.1f} GB')
    return create_folder(folder, shapes, dtype, max_shard_bytes)


def _torch_tensors(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a model's folder, as a (transposed) view of a host copy of its layer, merged dimensions apart."""
    for name, (weight, leaf, layer) in tensors(model).items():
        values = leaf[layer] if weight.stacked else leaf
        if not values.is_fully_addressable:
            values = multihost_utils.process_allgather(values, tiled=True)
        yield name, np.asarray(values).transpose(weight.order)


def _write_other_files(folder: pathlib.Path, config: bytes, files, tokenizer, eos_ids: Sequence[int]) -> None:
    if files:
        copy_other_files(files, folder)
    elif tokenizer:
        tokenizer.save_pretrained(folder)
    generation = folder / 'generation_config.json'
    if eos_ids and not generation.exists():
        generation.write_text(json.dumps({'eos_token_id': list(eos_ids)}, indent=2) + '\n')
    (folder / 'config.json').write_bytes(config)


def copy_other_files(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies every file of a folder that is not weights, byte for byte; links to files become files.

    Raises ValueError for a link to a folder or to nothing: what it stands for would be lost.
    """
    source = pathlib.Path(source)
    for parent, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if name not in CACHES)
        for path in (pathlib.Path(parent, name) for name in [*folders, *files]):
            if path.is_symlink() and not path.is_file():
                raise ValueError(f'{path} is a link to a folder or to nothing; put the files themselves there')
        for path in (pathlib.Path(parent, name) for name in files if not name.endswith(WEIGHT_SUFFIXES)):
            copy = pathlib.Path(target, path.relative_to(source))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def verify_hf(model: Transformer, folder: str | os.PathLike, progress: Progress | None = None) -> int:
    """Compares the config and, bit for bit, every tensor of an exported folder with the model; returns how many.

    Raises ValueError that names the first field or tensor that is missing, left over or different.
    """
    entries, shapes = read_folder(folder), torch_shapes(model)
    if difference := sorted(entries.keys() ^ shapes.keys()):
        kind = 'missing' if difference[0] in shapes else 'not of this model'
        raise ValueError(f'{folder}: {difference[0]} is {kind}; export again')
    ours = {field: getattr(model.cfg, field) for field in ('init_std', *OUR_FIELDS)}
    if (read := from_hf(read_config(folder), **ours)) != model.cfg:
        raise ValueError(f'{folder}: config.json describes {read}, but the model is {model.cfg}; export again')
    for name, values in _torch_tensors(model):
        if entries[name].shape != shapes[name]:
            raise ValueError(f'{folder}: {name} has shape {entries[name].shape}, not {shapes[name]}; export again')
        stored = entries[name].view().reshape(values.shape)
        for rows in _blocks(values.shape):
            block = np.ascontiguousarray(_cast(name, values[rows], stored.dtype)).view(np.uint8)
            if not np.array_equal(block, stored[rows].view(np.uint8)):
                raise ValueError(f'{folder}: {name} differs from the model; export again')
        if progress:
            progress(entries[name].nbytes)
    return len(entries)
