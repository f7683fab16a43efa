"""Safetensors folders by headers and byte ranges, in numpy alone.

The format: 8 bytes of header length, a JSON header with dtype, shape and byte range of each tensor, then the bytes,
without gaps. (The library's numpy reader knows no bfloat16 and reads whole tensors; a map of one tensor gives any part
of it for the pages touched.)
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_FETCH = 'the download is incomplete or damaged: fetch the folder again'
_MAX_HEADER = 100 << 20  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, dtype, shape and byte offset in the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """The tensor as a read-only map of the file. Drop it soon: its pages count as this process's memory while it
        lives."""
        return np.memmap(self.file, self.dtype, 'r', self.offset, self.shape)


def read_folder(folder: str | os.PathLike) -> dict[str, Entry]:
    """All tensors of a folder by name, from index and headers alone.

    Raises ValueError, naming the file or the tensor, where a shard is absent or cut, where index and shards disagree,
    or where a dtype is not a plain float. A file that the index does not name is not read, with a warning.
    """
    folder = pathlib.Path(folder)
    found = sorted(path.name for path in folder.glob('*.safetensors'))
    if not (folder / INDEX).is_file():
        if SINGLE not in found:
            other = ', '.join(found) or 'no safetensors file'
            raise ValueError(f'{folder} has {other}, but neither {SINGLE} nor {INDEX}; {_FETCH}, or save its weights '
                             'as safetensors')
        _warn_of_strays(folder, found, [SINGLE])
        return read_header(folder / SINGLE)
    index = _read_index(folder / INDEX)
    shards = sorted(set(index.values()))
    if SINGLE in found and SINGLE not in shards:
        raise ValueError(f'{folder} has both {SINGLE} and {INDEX} of other files; delete the one that is not meant')
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(f'{folder} lacks {", ".join(missing)}, which {INDEX} names; {_FETCH}')
    _warn_of_strays(folder, found, shards)
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in index.items():
        if name not in headers[shard]:
            raise ValueError(f'{folder} lacks the tensor {name}: {shard}, where {INDEX} puts it, does not hold it; '
                             f'{_FETCH}')
    for shard, tensors in headers.items():
        if unlisted := [name for name in tensors if index.get(name) != shard]:
            raise ValueError(f'{folder}: {shard} holds the tensor {unlisted[0]}, which {INDEX} does not list there; '
                             f'{_FETCH}')
    return {name: headers[shard][name] for name, shard in index.items()}


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(), object_pairs_hook=_unique)['weight_map']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not an index of safetensors files ({error}); {_FETCH}') from error
    if outside := [shard for shard in index.values() if pathlib.PurePath(shard).name != shard]:
        raise ValueError(f'{path} names {outside[0]}, which is not a file of the folder; {_FETCH}')
    return index


def _warn_of_strays(folder: pathlib.Path, found: Iterable[str], shards: Iterable[str]) -> None:
    if strays := sorted(set(found) - set(shards)):
        logging.warning('%s: not read, since no index names it: %s', folder, ', '.join(strays))


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """Tensors of one file.

    Raises ValueError if it is cut, longer than its header says, or holds a dtype that is not a plain float.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f'{path} has {size} bytes, too few for its header, or is no safetensors file; {_FETCH}')
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            header.pop('__metadata__', None)
            ranges = sorted(tuple(info['data_offsets']) for info in header.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} is no safetensors file ({error}); {_FETCH}') from error
    entries = {name: _entry(path, 8 + length, name, info) for name, info in header.items()}
    end = 0
    for start, stop in ranges:
        if start != end:
            raise ValueError(f'{path}: its header leaves a gap, or an overlap, at byte {end} of the data; {_FETCH}')
        end = stop
    if size != 8 + length + end:
        raise ValueError(f'{path} has {size} bytes, but its header speaks of {8 + length + end}; {_FETCH}')
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError('a name occurs twice')
    return values


def _entry(path: pathlib.Path, base: int, name: str, info: Mapping[str, Any]) -> Entry:
    if info['dtype'] not in DTYPES:
        raise ValueError(f'{path}: the tensor {name} is stored as {info["dtype"]}, whose codes are not weights by '
                         'themselves; use a checkpoint in bfloat16, float16 or float32')
    start, stop = info['data_offsets']
    entry = Entry(path, DTYPES[info['dtype']], tuple(info['shape']), base + start)
    if stop - start != entry.nbytes:
        raise ValueError(f'{path}: the tensor {name} has {stop - start} bytes, but its shape calls for {entry.nbytes}; '
                         f'{_FETCH}')
    return entry


def create_folder(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype,
                  max_shard_bytes: float) -> dict[str, Entry]:
    """Creates files with headers for tensors of one dtype, and an index if there are several; bytes are still holes."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards, room = [[]], max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards, room = [*shards, []], max_shard_bytes
        shards[-1].append(name)
        room -= size
    entries = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        entries |= _create_file(folder / file, {name: shapes[name] for name in names}, dtype)
    if len(shards) > 1:
        weight_map = {name: entry.file.name for name, entry in sorted(entries.items())}
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')
    return entries


def _create_file(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, Entry]:
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': code, 'shape': list(shape), 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + offset)
    return read_header(path)


def write_tensor(entry: Entry, blocks: Iterable[np.ndarray]) -> None:
    """Fills in one tensor, given as consecutive blocks in its dtype."""
    written = 0
    with entry.file.open('r+b') as file:
        file.seek(entry.offset)
        for block in blocks:
            assert block.dtype == entry.dtype, (block.dtype, entry)
            written += file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    assert written == entry.nbytes, (written, entry)


def finish_folder(folder: pathlib.Path, entries: Mapping[str, Entry]) -> None:
    """Hands a folder just written to the disk; raises OSError unless its headers read back as these tensors."""
    for path in sorted({entry.file for entry in entries.values()}):
        with path.open('rb') as file:
            os.fsync(file.fileno())
    total = sum(entry.nbytes for entry in entries.values())
    indexed = json.loads((folder / INDEX).read_text())['metadata']['total_size'] if (folder / INDEX).exists() else total
    if read_folder(folder) != dict(entries) or indexed != total:
        raise OSError(f'{folder} does not read back as it was written')
