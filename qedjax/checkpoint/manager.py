"""Checkpoints: one Orbax folder per step, sealed by a manifest.

A checkpoint is a folder that Orbax writes plus our `manifest.json`, which comes last, just before the folder gets its
name. It holds the caller's metadata, the shape and dtype of every array, and the size of every file, so a folder can be
judged complete on any file system, after any copy. Inside, the tree is a flat mapping from key path
('model/embed/value') to array: any registered dataclass, module or optimizer state can be saved, and a part of it read.

Arrays are stored raw: weights hardly compress, and the bytes then go from the array to the file without a copy.
"""

import contextlib
import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

MANIFEST = 'manifest.json'
TMP_SUFFIX = '.orbax-checkpoint-tmp'
# Orbax finishes the last two after the manifest; no read needs them.
_UNLISTED = {MANIFEST, '_CHECKPOINT_METADATA', 'commit_success.txt'}
_CHUNK_BYTES = 128 << 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


def save_tree(path: epath.PathLike, tree, metadata: Mapping[str, Any]) -> None:
    """Writes one checkpoint and returns when it is on disk, holding less than 1 GB besides the tree on the way.

    Large arrays are cut into files of 128 MiB, since whoever reads them may be sharded otherwise.
    Raises ValueError if `path` exists, CheckpointError if it cannot be written.
    """
    path = epath.Path(path).absolute()
    if path.exists():
        raise ValueError(f'{path} already exists; give a new folder or delete it first')
    manifest = _manifest(tree, metadata)
    # Cut arrays are copied as they are written; a file a chunk and a bound of one array keep few copies alive.
    bound = max(map(_nbytes, manifest['arrays'].values()), default=0) // 10**9 + 1
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, save_concurrent_gb=bound)
    with _explained(path), contextlib.closing(_writer(handler, lambda: _seal(path, manifest))) as writer:
        writer.save(path, args=_save_args(tree, _CHUNK_BYTES))
        writer.wait_until_finished()


def restore_tree(path: epath.PathLike, abstract):
    """Reads a whole checkpoint, bit for bit.

    Args:
      path: a complete checkpoint folder; nothing is written to it.
      abstract: tree of arrays or ShapeDtypeStructs. A leaf becomes a jax.Array with its sharding (those of
        `jax.eval_shape` are taken on the mesh in force), a numpy array if it has none, or a number if it is one.

    Raises ValueError that names the array if one is missing, left over, or has another shape or dtype.
    """
    extra = sorted(read_manifest(path)['arrays'].keys() - set(_flatten(abstract)[0]))
    if extra:
        raise ValueError(f'{path} holds {extra[0]!r} ({len(extra)} such arrays), which this run has no place for; '
                         'resume with the config that wrote it')
    return _restore(path, abstract, prefix='', cast=False)


def restore_subtree(path: epath.PathLike, abstract, key: str = 'model'):
    """Reads the part under a first-level key only, cast to the dtypes of `abstract`; otherwise as `restore_tree`."""
    return _restore(path, abstract, prefix=f'{key}/', cast=True)


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
    """The manifest: 'metadata', 'metric', 'arrays' and 'files'. Raises ValueError if the folder is incomplete."""
    if reason := problem(path):
        raise ValueError(f'{path} is not a complete checkpoint: {reason}')
    return json.loads((epath.Path(path) / MANIFEST).read_text())


def problem(path: epath.PathLike) -> str | None:
    """Why a folder is not a complete checkpoint, or None if it is one."""
    path = epath.Path(path)
    if path.name.endswith(TMP_SUFFIX):
        return 'a save that never finished'
    if not path.is_dir():
        return 'not a folder'
    if not (path / MANIFEST).exists():
        return f'no {MANIFEST}'
    try:
        files = json.loads((path / MANIFEST).read_text())['files'].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f'{MANIFEST} is not readable'
    for name, size in files:
        if not (path / name).exists():
            return f'file {name} is missing'
        if (found := (path / name).stat().length) != size:
            return f'file {name} has {found} bytes instead of {size}'
    return None


def scan(directory: epath.PathLike) -> tuple[dict[int, float | None], dict[str, str]]:
    """Complete steps of a run, ascending, with their metrics; and every other entry with the reason why it is none."""
    directory = epath.Path(directory)
    steps, skipped = {}, {}
    for path in directory.iterdir() if directory.is_dir() else ():
        reason = problem(path) if _is_step(path.name) or path.name.endswith(TMP_SUFFIX) else 'not a step'
        if reason:
            skipped[path.name] = reason
        else:
            steps[int(path.name)] = json.loads((path / MANIFEST).read_text())['metric']
    return dict(sorted(steps.items())), skipped


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The checkpoint meant by a folder: itself, or the newest complete step in it or in its `checkpoints`."""
    path = epath.Path(path)
    if (path / MANIFEST).exists():
        return path
    reasons = ''
    for directory in (path, path / 'checkpoints'):
        steps, skipped = scan(directory)
        if steps:
            return directory / str(max(steps))
        reasons += _listed(skipped)
    raise ValueError(f'no complete checkpoint in {path}{reasons}')


class Checkpointer(contextlib.AbstractContextManager):
    """Saves the steps of a run in the background, deletes old ones, and restores.

    Use it as a context manager: leaving it waits for the last save and raises if that failed.
    """

    def __init__(self, directory: epath.PathLike, fingerprint: Mapping[str, Any], *, mode: str = 'resume',
                 keep: int = 2, keep_every: int = 0, best: str = 'min'):
        """Opens the folder of a run, and refuses to mix two runs in it.

        Args:
          directory: holds one folder per step; made if absent.
          fingerprint: what must not change between the parts of a run (JSON; config and tokenizer, say).
          mode: 'resume' (the newest step must have this fingerprint; an empty folder is fine), 'fresh' (must hold no
            steps) or 'overwrite' (deletes the steps that are there).
          keep: newest steps to keep.
          keep_every: keeps every step that is a multiple of it; 0 for none.
          best: 'min' or 'max': the step whose metric is the best is kept too.

        Raises ValueError if the folder belongs to another run.
        """
        if mode not in ('resume', 'fresh', 'overwrite') or best not in ('min', 'max') or keep < 1:
            raise ValueError(f"checkpoints need mode resume, fresh or overwrite, best min or max, and keep >= 1, not "
                             f'{mode=}, {best=}, {keep=}')
        self.directory = epath.Path(directory).absolute()
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._keep, self._keep_every, self._best = keep, keep_every, best
        self._saving: int | None = None  # a step not yet waited for
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self.steps, skipped = scan(self.directory)
        multihost_utils.assert_equal(np.int32(max(self.steps, default=-1)),
                                     f'processes see different steps in {self.directory}; it must be on a shared disk')
        self._leftovers = [name for name in skipped if name.endswith(TMP_SUFFIX)]
        for name, reason in skipped.items():
            logging.warning('%s: skipped (%s)', self.directory / name, reason)
        self._open(mode, skipped)
        self._writer = _writer(ocp.PyTreeCheckpointHandler(use_compression=False), lambda: _seal(*self._sealing))

    def _open(self, mode: str, skipped: Mapping[str, str]) -> None:
        taken = [str(step) for step in self.steps] + [name for name in skipped if _is_step(name)]
        if mode == 'fresh' and taken:
            raise ValueError(f'{self.directory} already holds steps {", ".join(taken)}; resume that run, '
                             'choose another workdir, or overwrite')
        if mode == 'overwrite':
            for name in taken:
                _delete(self.directory / name)
            self.steps = {}
        if self.steps:
            path = self.path(max(self.steps))
            difference = _difference(read_manifest(path)['metadata'].get('fingerprint'), self._fingerprint)
            if difference:
                raise ValueError(f'{path} belongs to another run: {difference}; choose another workdir, or overwrite')
            logging.info('%s: newest complete step is %d', self.directory, max(self.steps))

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def latest_complete(self) -> int | None:
        """Newest step that can be restored."""
        return max(self.steps, default=None)

    def best_step(self) -> int | None:
        """Step with the best metric, the newest of equals."""
        sign = 1 if self._best == 'max' else -1
        scored = [(sign * metric, step) for step, metric in self.steps.items() if metric is not None]
        return max(scored)[1] if scored else None

    def save(self, step: int, tree, metadata: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts to save a step, and returns once the arrays may be donated.

        Waits for the save before, and raises its error. A damaged folder of this number is replaced.
        Raises ValueError if a step as new as this one exists, since nothing is skipped silently, and CheckpointError if
        it cannot be written.
        """
        self.wait()
        if step <= max(self.steps, default=-1):
            raise ValueError(f'cannot save step {step}: {self.directory} already has step {max(self.steps)}; '
                             'choose another workdir, or delete the newer steps')
        manifest = _manifest(tree, {**metadata, 'fingerprint': self._fingerprint}, metric)
        path = self.path(step)
        if not self.directory.is_dir():
            raise CheckpointError(f'could not write {path}: {self.directory} was deleted')
        self._sealing = path, manifest
        self._leftovers.append(f'{step}{TMP_SUFFIX}')  # there only if this save fails
        with _explained(path):
            self._writer.save(path, args=_save_args(tree), force=True)
        self._saving = step

    def wait(self) -> None:
        """Waits for the save in progress, then deletes old steps. Raises CheckpointError if the save failed."""
        step, self._saving = self._saving, None
        if step is not None:
            with _explained(self.path(step)):
                self._writer.wait_until_finished()
                self.steps[step] = read_manifest(self.path(step))['metric']  # only a complete step lets older ones go
            self._prune()

    def restore(self, abstract, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
        """Tree (see `restore_tree`), metadata and number of a step, the newest complete one by default."""
        self.wait()
        if step is None and not self.steps:
            raise ValueError(f'no complete checkpoint in {self.directory}{_listed(scan(self.directory)[1])}')
        step = max(self.steps) if step is None else step
        tree = restore_tree(self.path(step), abstract)
        logging.info('restored %s', self.path(step))
        return tree, read_manifest(self.path(step))['metadata'], step

    def close(self) -> None:
        """Waits for the last save and raises if it failed."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def __exit__(self, *exception) -> None:
        self.close()

    def _prune(self) -> None:
        """Deletes what retention drops and what killed saves left behind; called only when a newer step is on disk."""
        kept = {*sorted(self.steps)[-self._keep:], self.best_step()}
        kept |= {step for step in self.steps if self._keep_every and step % self._keep_every == 0}
        for name in [*map(str, self.steps.keys() - kept), *self._leftovers]:
            _delete(self.directory / name)
        self.steps = {step: metric for step, metric in self.steps.items() if step in kept}
        self._leftovers = []


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name


def _flatten(tree) -> tuple[list[str], list, Any]:
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
    assert len(set(names)) == len(names), 'two leaves of the tree have one name'
    return names, [leaf for _, leaf in leaves], structure


def _manifest(tree, metadata: Mapping[str, Any], metric: float | None = None) -> dict[str, Any]:
    names, leaves, _ = _flatten(tree)
    arrays = {name: {'shape': jnp.shape(leaf), 'dtype': _dtype(leaf)} for name, leaf in zip(names, leaves, strict=True)}
    metric = float(metric) if metric is not None and math.isfinite(metric) else None
    return json.loads(json.dumps({'metadata': dict(metadata), 'metric': metric, 'arrays': arrays}))


def _dtype(leaf) -> str:
    return str(np.dtype(leaf.dtype)) if hasattr(leaf, 'dtype') else str(np.asarray(leaf).dtype)


def _save_args(tree, chunk_bytes: int | None = None) -> ocp.args.PyTreeSave:
    names, leaves, _ = _flatten(tree)
    leaves = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves]
    flat = dict(zip(names, leaves, strict=True))
    save_args = dict.fromkeys(names, ocp.SaveArgs(chunk_byte_size=chunk_bytes))
    # File size 0: arrays are cut where `chunk_bytes` says and nowhere else, since each cut is a copy.
    return ocp.args.PyTreeSave(flat, save_args=save_args, ocdbt_target_data_file_size=0)


def _writer(handler: ocp.PyTreeCheckpointHandler, seal: Callable[[], None]) -> ocp.AsyncCheckpointer:
    # Folders made in the background would make every thread of a failed save wait minutes for the folder, even at exit.
    return ocp.AsyncCheckpointer(handler, async_options=ocp.options.AsyncOptions(
        post_finalization_callback=seal, create_directories_asynchronously=False))


def _seal(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a finished save; Orbax calls it (on one process) just before the folder gets its name."""
    tmp = path.parent / f'{path.name}{TMP_SUFFIX}'
    root = tmp if tmp.exists() else path  # object stores cannot rename: there Orbax writes in place
    files = {str(file.relative_to(root)): file.stat().length for file in _files(root) if file.name not in _UNLISTED}
    (root / MANIFEST).write_text(json.dumps({**manifest, 'files': files}, indent=1))


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _restore(path: epath.PathLike, abstract, prefix: str, cast: bool):
    names, leaves, structure = _flatten(abstract)
    names = [prefix + name for name in names]
    saved = read_manifest(path)['arrays']
    for name, leaf in zip(names, leaves, strict=True):
        _check(path, name, saved.get(name), leaf, cast)
    items = dict(zip(names, (_restore_args(leaf) for leaf in leaves), strict=True))
    handler, restored = ocp.PyTreeCheckpointHandler(), {}
    for batch in _batches(names, saved):
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(batch, 0), restore_args={name: items[name] for name in batch}, partial_restore=True)
        restored |= jax.block_until_ready(handler.restore(epath.Path(path).absolute(), args=args))
        gc.collect()  # JAX frees the host buffers of finished transfers only here
    values = [type(leaf)(restored[name].item()) if isinstance(leaf, (int, float)) else restored[name]
              for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def _batches(names: list[str], arrays: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names in groups of about 1 GB for each process, largest first: what is being read may be in memory twice."""
    batch, size = [], 0
    for name in sorted(names, key=lambda name: _nbytes(arrays[name]), reverse=True):
        if batch and size + _nbytes(arrays[name]) > jax.process_count() * 10**9:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += _nbytes(arrays[name])
    if batch:
        yield batch


def _nbytes(array: Mapping[str, Any]) -> int:
    return math.prod(array['shape']) * jnp.dtype(array['dtype']).itemsize


def _check(path, name: str, saved: Mapping[str, Any] | None, leaf, cast: bool) -> None:
    if saved is None:
        raise ValueError(f'{path} has no array {name!r}')
    if tuple(saved['shape']) != jnp.shape(leaf):
        raise ValueError(f'{name!r} has shape {tuple(saved["shape"])} in {path}, but {jnp.shape(leaf)} in this run')
    if not cast and saved['dtype'] != _dtype(leaf):
        raise ValueError(f'{name!r} is {saved["dtype"]} in {path}, but {_dtype(leaf)} in this run')


def _restore_args(leaf) -> ocp.RestoreArgs:
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=_dtype(leaf))
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _delete(path: epath.Path) -> None:
    """Deletes a folder, on one process, so that a half-deleted one is never taken for a checkpoint."""
    if jax.process_index() != 0:
        return
    if os.path.islink(path) or os.path.isfile(path):
        path.unlink()  # never what a link points to
    else:
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


def _difference(old, new, name: str = 'fingerprint') -> str | None:
    """First place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (_difference(old.get(key), new.get(key), f'{name}.{key}') for key in sorted(old.keys() | new.keys()))
        return next(filter(None, parts), None)
    return None if old == new else f'{name} is {old!r} there and {new!r} here'


def _listed(skipped: Mapping[str, str]) -> str:
    return ''.join(f'; {name}: {reason}' for name, reason in skipped.items() if reason != 'not a step')


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Makes any failure to write `path` an error with the path and the space left; removes the unfinished folder."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(f'{path}{TMP_SUFFIX}', ignore_errors=True)
        place = next((parent for parent in (path, *path.parents) if os.path.exists(parent)), None)
        free = f'{shutil.disk_usage(place).free / 1e9:.3f} GB free' if place else 'free space unknown'
        raise CheckpointError(f'could not write {path} ({free}): {error}') from error
