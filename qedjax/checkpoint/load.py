"""One way in for every launcher: a model, its config and its tokenizer from a Hugging Face folder or from our own checkpoint."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from qedjax.checkpoint import manager
from qedjax.checkpoint.hf import copy_other_files, load_hf
from qedjax.model.config import ModelConfig, RopeScaling, validate
from qedjax.model.hf_config import from_hf, read_config
from qedjax.model.transformer import Transformer
from qedjax.sharding import abstract

RUNTIME_FIELDS = ('param_dtype', 'dtype', 'attention', 'attention_block', 'remat')
HF_FILES = 'hf_files'  # beside our checkpoints: the tokenizer, template, configs and licence that an export carries over


def is_hf_folder(path: str | os.PathLike) -> bool:
    """Whether a folder is Hugging Face's (config.json and safetensors) rather than ours."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f'{path} is not a folder; give a Hugging Face folder or a checkpoint of ours')
    return any(path.glob('*.safetensors*'))


def resolve_config(init: str | os.PathLike, runtime: ModelConfig) -> ModelConfig:
    """Sizes from the checkpoint, RUNTIME_FIELDS from `runtime`; `runtime` itself where `init` is ''."""
    if not init:
        cfg = runtime
    else:
        saved = from_hf(read_config(init)) if is_hf_folder(init) else saved_config(init)
        cfg = dataclasses.replace(saved, **{field: getattr(runtime, field) for field in RUNTIME_FIELDS})
    validate(cfg)
    return cfg


def saved_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig that a checkpoint of ours was written with."""
    fields = manager.read_manifest(manager.find_checkpoint(path))['metadata']['model']
    return ModelConfig(**{**fields, 'rope_scaling': RopeScaling(**fields['rope_scaling'])})


def load_model(path: str | os.PathLike, mesh: Mesh, cfg: ModelConfig) -> Transformer:
    """Parameters from either kind of folder, sharded over `mesh`, in cfg.param_dtype."""
    if is_hf_folder(path):
        return load_hf(path, cfg, mesh)
    target = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
    return manager.restore_subtree(manager.find_checkpoint(path), target)


def tokenizer_folder(path: str | os.PathLike) -> pathlib.Path:
    """Folder of the tokenizer files that belong to a checkpoint of either kind, or to a folder of tokenizer files."""
    path = pathlib.Path(path)
    for folder in (path, path / HF_FILES, path.parent / HF_FILES, path.parent.parent / HF_FILES):
        if (folder / 'tokenizer_config.json').is_file() or (folder / 'tokenizer.json').is_file():
            return folder
    raise ValueError(f'{path} has no tokenizer.json or tokenizer_config.json, nor an {HF_FILES} folder with them; name the tokenizer\'s folder')


def load_tokenizer(path: str | os.PathLike):
    """The transformers tokenizer of a checkpoint; never asks the network."""
    from transformers import AutoTokenizer  # seconds to import: only when it is needed

    return AutoTokenizer.from_pretrained(tokenizer_folder(path), local_files_only=True)


def read_generation_config(path: str | os.PathLike) -> dict[str, Any]:
    """generation_config.json beside the tokenizer (its EOS ids, mostly); empty if there is none."""
    file = tokenizer_folder(path) / 'generation_config.json'
    return json.loads(file.read_text()) if file.is_file() else {}


def copy_tokenizer(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Copies all files but weights into workdir/hf_files, so that the run's checkpoints can be served and exported on their own."""
    target = pathlib.Path(workdir) / HF_FILES
    if jax.process_index() == 0 and not target.exists():
        target.mkdir(parents=True)
        copy_other_files(tokenizer_folder(source), target)
