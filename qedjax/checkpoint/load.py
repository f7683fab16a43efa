"""One way in for every launcher: model, config and tokenizer of a Hugging Face folder or of a checkpoint of ours."""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.sharding import Mesh

from qedjax.checkpoint import manager
from qedjax.checkpoint.hf import copy_other_files, load_hf
from qedjax.model.config import ModelConfig, RopeScaling, validate
from qedjax.model.hf_config import OUR_FIELDS, from_hf, read_config
from qedjax.model.transformer import Transformer
from qedjax.sharding import abstract

HF_FILES = 'hf_files'  # beside our checkpoints: tokenizer, template, configs and licence, which an export carries over


def is_hf_folder(path: str | os.PathLike) -> bool:
    """Whether a folder is Hugging Face's rather than ours: it has safetensors, or config.json names a model type."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f'{path} is not a folder; give a Hugging Face folder or a checkpoint of ours')
    if any(path.glob('*.safetensors*')):
        return True
    return (path / 'config.json').is_file() and 'model_type' in read_config(path)


def resolve_config(init: str | os.PathLike, runtime: ModelConfig) -> ModelConfig:
    """Sizes from the checkpoint, fields that no config.json has from `runtime`; `runtime` itself where `init` is ''."""
    if not init:
        cfg = runtime
    else:
        saved = from_hf(read_config(init)) if is_hf_folder(init) else saved_config(init)
        cfg = dataclasses.replace(saved, **{field: getattr(runtime, field) for field in OUR_FIELDS})
    validate(cfg)
    return cfg


def saved_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig that a checkpoint of ours was written with."""
    checkpoint = manager.find_checkpoint(path)
    fields = manager.read_manifest(checkpoint)['metadata'].get('model')
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if not fields or fields.keys() - known:
        raise ValueError(f'{checkpoint} has no model config that this version knows; use the one that wrote it')
    return ModelConfig(**{**fields, 'rope_scaling': RopeScaling(**fields['rope_scaling'])})


def load_model(path: str | os.PathLike, mesh: Mesh, cfg: ModelConfig) -> Transformer:
    """Parameters from either kind of folder, sharded over `mesh`, in cfg.param_dtype."""
    if is_hf_folder(path):
        return load_hf(path, cfg, mesh)
    target = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
    return manager.restore_subtree(manager.find_checkpoint(path), target)


def files_folder(path: str | os.PathLike) -> pathlib.Path | None:
    """The hf_files of a run, given its workdir, its checkpoints folder or one step; None if it has none."""
    path = pathlib.Path(path).absolute()
    return next((folder / HF_FILES for folder in (path, *path.parents[:2]) if (folder / HF_FILES).is_dir()), None)


def tokenizer_folder(path: str | os.PathLike) -> pathlib.Path:
    """Folder of the tokenizer files that belong to a checkpoint of either kind, or to a folder of tokenizer files."""
    for folder in filter(None, (pathlib.Path(path), files_folder(path))):
        if (folder / 'tokenizer_config.json').is_file() or (folder / 'tokenizer.json').is_file():
            return folder
    raise ValueError(f'{path} has no tokenizer.json or tokenizer_config.json, nor an {HF_FILES} folder with them; '
                     "name the tokenizer's folder")


def load_tokenizer(path: str | os.PathLike):
    """The transformers tokenizer of a checkpoint; never asks the network."""
    from transformers import AutoTokenizer  # seconds to import: only when it is needed

    return AutoTokenizer.from_pretrained(tokenizer_folder(path), local_files_only=True)


def read_generation_config(path: str | os.PathLike) -> dict[str, Any]:
    """generation_config.json beside the tokenizer (its EOS ids, mostly); empty if there is none."""
    file = tokenizer_folder(path) / 'generation_config.json'
    return json.loads(file.read_text()) if file.is_file() else {}


def copy_tokenizer(source: str | os.PathLike, workdir: str | os.PathLike, anew: bool = False) -> None:
    """Copies all files but weights into workdir/hf_files: the run can then be served and exported on its own.

    A run keeps the files that it began with; `anew` replaces those of another run, whose checkpoints are gone.
    """
    target = pathlib.Path(workdir) / HF_FILES
    if jax.process_index() == 0 and (anew or not target.exists()):
        partial = target.with_name(f'.{HF_FILES}.incomplete')  # a kill must not leave half of them to be taken for all
        shutil.rmtree(partial, ignore_errors=True)
        copy_other_files(tokenizer_folder(source), partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)


def refuse_inside(workdir: str | os.PathLike, **folders: str) -> None:
    """Raises ValueError for a folder, by the name of its setting, that lies in the workdir: a run might replace what it starts from."""
    for name, folder in folders.items():
        if folder and pathlib.Path(workdir).resolve() in ((path := pathlib.Path(folder).resolve()), *path.parents):
            raise ValueError(f'{name}={folder} lies in the workdir, whose checkpoints this run would replace; name another --workdir')
