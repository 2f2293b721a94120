"""The tokenizer that belongs to a model: of the folder it came from, or of the vocabulary inside its GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from transload import checkpoint as checkpoints
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError
from transload.formats.gguf import metadata_of
from transload.models.chatglm_tokenizer import native_files
from transload.models.gguf_assets import tokenizer_of
from transload.models.gguf_config import generation_config


def tokenizer(model: PreTrainedModel | str | Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer for a model that Transload loaded, or for the checkpoint at a path.

    Raises ConfigError when there is none.
    """
    if isinstance(model, PreTrainedModel):
        kept = getattr(model, "_transload_tokenizer", None)
        if kept is not None:
            return kept
        model = model.name_or_path
    path = Path(model)
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists()):
        return of_checkpoint(checkpoints.open(path))
    return _of_folder(path.parent if path.is_file() else path, trust_remote_code)


def of_checkpoint(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an open checkpoint."""
    if checkpoint.source.container == "gguf":
        return tokenizer_of(metadata_of(checkpoint.source))
    path = checkpoint.path
    return _of_folder(path if path.is_dir() else path.parent, trust_remote_code)


def generation_settings(checkpoint: Checkpoint) -> GenerationConfig | None:
    """What the checkpoint says about generation (end tokens, sampling), None where it says nothing."""
    if checkpoint.source.container == "gguf":
        return GenerationConfig.from_dict(generation_config(metadata_of(checkpoint.source)))
    settings = checkpoint.source.json("generation_config.json")
    return None if settings is None else GenerationConfig.from_dict(settings)


def _of_folder(folder: Path, trust_remote_code: bool) -> Any:
    made = {} if trust_remote_code else native_files(folder)
    with TemporaryDirectory() as empty:
        for name, data in made.items():
            Path(empty, name).write_bytes(data)
        return _loaded(folder, Path(empty) if made else folder, trust_remote_code)


def _loaded(folder: Path, files: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(files, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as e:
        raise ConfigError(f"{folder}: no tokenizer could be loaded ({e}); give tokenizer=") from e
