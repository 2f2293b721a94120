"""Where a model comes from: a checkpoint folder, a config.json (file, URL, mapping), with or without a recipe."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transload.errors import ConfigError
from transload.headers import TensorInfo, is_gguf, read_gguf_header, read_headers
from transload.models.gguf_config import hf_config
from transload.models.gguf_names import parts
from transload.models.info import ModelInfo, read_model
from transload.plan.model import Model, build_model
from transload.plan.recipes import FLOAT_RECIPE, recipe_by_name, recipe_from_config, recipe_from_description
from transload.plan.stored import gguf_scheme, read_stored

ModelSource = Model | ModelInfo | Mapping[str, object] | str | Path
LARGEST_CONFIG = 16 << 20
_WEIGHTS = ("*.safetensors", "*.gguf")


def load_model(source: ModelSource, recipe: str | None = None) -> Model:
    """The model to plan for. recipe: as if quantized so, instead of what the checkpoint or config says.

    Only config.json, quant_model_description.json and tensor headers are read. Raises ConfigError when a file is
    missing or not understood, FormatError when headers contradict the config.
    """
    if isinstance(source, Model):
        return source if recipe is None else build_model(source.info, recipe_by_name(recipe), source.name)
    if isinstance(source, ModelInfo):
        return build_model(source, recipe_by_name(recipe or "bf16"), source.architecture)
    if isinstance(source, Mapping):
        return _from_config(source, "config", str(source.get("_name_or_path") or source.get("model_type")), recipe)
    text = str(source)
    if text.startswith(("http://", "https://")):
        return _from_config(_fetched(text), text, text.rstrip("/").removesuffix("/config.json").split("/")[-1], recipe)
    path = Path(text)
    if path.is_dir():
        return _from_folder(path, recipe)
    if not path.is_file():
        raise ConfigError(f"{path}: no such folder or config file; give a checkpoint folder, a config.json or its URL")
    if is_gguf(path):
        return _from_gguf(path, recipe)
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    return _from_config(_json(path), str(path), name, recipe)


def _from_folder(path: Path, recipe: str | None) -> Model:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{path}: has no config.json")
    config = _json(config_file)
    name = path.resolve().name
    has_weights = any(next(iter(path.glob(pattern)), None) for pattern in _WEIGHTS)
    if recipe is not None or not has_weights:
        return _from_config(config, str(config_file), name, recipe, path)
    info = read_model(_unwrapped(config), str(config_file))
    headers: Mapping[str, TensorInfo] = read_headers(path)
    stored = read_stored(headers, info, _description(path))
    notes = (f"counted whole on every rank: {', '.join(stored.other)} ...",) if stored.other_bytes else ()
    model = build_model(info, FLOAT_RECIPE, name, stored.schemes, stored.other_bytes, notes)
    return _named_by_content(model)


def _from_gguf(path: Path, recipe: str | None) -> Model:
    """A GGUF file: its metadata is the config, its tensors are the headers under llama.cpp's names."""
    header = read_gguf_header(path)
    info = read_model(hf_config(header.metadata, header.tensors), str(path))
    if recipe is not None:
        return build_model(info, recipe_by_name(recipe), path.stem)
    schemes = {}
    for tensor in header.tensors.values():
        for part in parts(header.metadata, tensor.name, tensor.shape):
            name = part.name.removesuffix(".weight").replace(".experts.", ".experts.0.")
            schemes[name] = gguf_scheme(tensor.dtype)
    return _named_by_content(build_model(info, FLOAT_RECIPE, path.stem, schemes))


def _named_by_content(model: Model) -> Model:
    """The model with its recipe named after the schemes that its layers really have, the largest first."""
    sizes: Counter[str] = Counter()
    for kind in model.layer_kind:
        for weight in model.kinds[kind]:
            m = weight.module
            if m.quantizable:
                sizes[weight.scheme.name] += m.n * m.k * m.experts
    name = " + ".join(name for name, _ in sizes.most_common(3))
    return replace(model, recipe=replace(model.recipe, name=name))


def _from_config(
    config: Mapping[str, object], source: str, name: str, recipe: str | None, folder: Path | None = None
) -> Model:
    info = read_model(_unwrapped(config), source)
    if recipe is not None:
        return build_model(info, recipe_by_name(recipe), name)
    description = _description(folder) if folder is not None else {}
    found = recipe_from_description(description) if description else recipe_from_config(info.quantization)
    return build_model(info, found, name)


def _unwrapped(config: Mapping[str, object]) -> Mapping[str, object]:
    """The config itself when a file wraps it with its source ({"config": {...}, "_source": ...})."""
    inner = config.get("config")
    return inner if isinstance(inner, Mapping) and "model_type" not in config else config


def _description(folder: Path) -> Mapping[str, object]:
    path = folder / "quant_model_description.json"
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > LARGEST_CONFIG * 4:
            raise ConfigError(f"{path}: larger than a config may be")
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _fetched(url: str) -> Mapping[str, object]:
    full = url if url.endswith(".json") else url.rstrip("/") + "/config.json"
    try:
        with urllib.request.urlopen(full, timeout=20) as answer:
            data = answer.read(LARGEST_CONFIG + 1)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise ConfigError(f"{full}: cannot be fetched: {error}") from error
    if len(data) > LARGEST_CONFIG:
        raise ConfigError(f"{full}: larger than a config may be")
    return _object(data, full)


def _object(data: bytes, source: str) -> Mapping[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value
