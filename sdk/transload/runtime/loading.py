"""transload.load: a checkpoint of any format as a transformers model that runs on the device that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from transload import checkpoint as checkpoints
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError, FormatError, Unsupported
from transload.hal import Device, find_device
from transload.models.classes import SAME_MODEL, not_in_transformers, without_quantization
from transload.runtime.config import Progress, TransloadConfig
from transload.runtime.floats import float_state
from transload.runtime.packed_cache import PackedCache
from transload.runtime.spread import Spread
from transload.runtime.tokenizers import generation_settings

if TYPE_CHECKING:
    from transload.plan.result import Plan


def load(
    path: str | Path,
    device: str = "auto",
    scheme: str | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    quantize: TransloadConfig | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    plan: Plan | Mapping[str, str | int] | str | None = None,
    offload_folder: str | Path | None = None,
    packed_cache: bool | str | Path = False,
) -> PreTrainedModel:
    """A model from a GGUF file or a Hugging Face folder of any format that Transload reads, ready to generate.

    Quantized weights keep their numbers. A float checkpoint stays float, in its own dtype, unless `bits` (or `quantize`
    with everything spelled out) asks for rounding on load: load(path, bits=4) is the one-line 4-bit model.

    device: "auto", "cpu", "cuda:1", "npu:0". scheme: "w4a16" (float activations), "w4a8" (dynamic int8 activations), or
    None: as stored. What runs in the end, module by module, is in `transload.runtime.report(model)`.
    dtype: of activations and float weights; by default float32 on the CPU and the checkpoint's own elsewhere.
    progress: called with the bytes in place and the bytes in all.
    plan: spreads the model over this machine by whole layers: devices first, then RAM, then disk. A Plan, a device_map
    (module name -> 0, "npu:0", "cpu", "disk"), or "auto": planned here for what this machine has free. Layers in RAM
    are computed on the CPU. offload_folder: for what lies on disk; a temporary folder when None.
    packed_cache: keeps the packed weights of a quantized checkpoint in a file, so that the next load maps them instead
    of decoding and packing again, and processes share their memory. True: beside the checkpoint; a path: in that
    folder, or that file (*.packed). The native kernels of the CPU have such weights; others pack as ever.

    Raises ConfigError for requests that contradict the checkpoint, FormatError for broken files or missing weights,
    DoesNotFit when a plan finds no place for a layer, NoBackend, NoKernel, Unsupported.
    """
    checkpoint = checkpoints.open(path, "stored" if trust_remote_code else "native")
    quantized = any(entry.spec is not None for entry in checkpoint.entries.values())
    recipe = _recipe(checkpoint, quantized, scheme, bits, quantize)
    if packed_cache and not quantized:
        raise ConfigError(f"{checkpoint.path} is float: packed_cache keeps the packed weights of quantized checkpoints")
    spread = _spread(path, plan, device, recipe, quantized, offload_folder)
    if spread is not None:
        device = str(spread.first)
        spread = None if spread.alone is not None else spread
    backend, found = find_device(recipe.device if recipe is not None and device == "auto" else device)
    config = model_config(checkpoint, trust_remote_code)
    if recipe is not None:
        recipe.device = f"{found.backend}:{found.index}"
        if quantized:
            recipe.reading(checkpoint, progress, PackedCache(packed_cache, checkpoint) if packed_cache else None)
        if spread is not None:
            recipe.spreading(spread)
    with _no_bars(), _named_gaps(checkpoint, spread), torch.no_grad():
        model, info = model_class(config, checkpoint.path).from_pretrained(
            None,
            config=config,
            state_dict=float_state(checkpoint),
            quantization_config=recipe,
            dtype=dtype or _default_dtype(config, checkpoint, found, recipe is not None),
            device_map=_device_map(spread, recipe, backend.torch_device(found)),
            offload_folder=str(spread.folder) if spread is not None and spread.disk else None,
            output_loading_info=True,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise FormatError(f"{checkpoint.path}: {len(info['missing_keys'])} weights of the model are missing: {some}")
    if spread is not None and recipe is not None:
        spread.attach(model)
    elif spread is not None:
        spread.keep(model)
    model.config.name_or_path = model.name_or_path = str(checkpoint.path)
    settings = generation_settings(checkpoint)
    if settings is not None and model.can_generate():
        model.generation_config = settings
    return cast(PreTrainedModel, model)


def _recipe(
    checkpoint: Checkpoint, quantized: bool, scheme: str | None, bits: int | None, quantize: TransloadConfig | None
) -> TransloadConfig | None:
    """The configuration that the quantizer works from; None for a float checkpoint that stays float."""
    if bits is not None and quantize is not None:
        raise ConfigError("bits and quantize were both given: put the bits into quantize")
    asked = quantize is not None or bits is not None
    if quantized and asked:
        raise ConfigError(
            f"{checkpoint.path} is quantized already ({checkpoint.format.name}) and keeps its numbers: leave out bits "
            "and quantize, or requantize it with `transload port --requantize`"
        )
    if not quantized and not asked:
        if scheme is not None:
            raise ConfigError(
                f"{checkpoint.path} is float; scheme '{scheme}' needs bits=4 or quantize=TransloadConfig(...)"
            )
        return None
    recipe = copy(quantize) if quantize is not None else TransloadConfig(bits=4 if bits is None else bits)
    if scheme is not None:
        if quantize is not None and quantize.scheme not in (None, scheme.lower()):
            raise ConfigError(f"scheme '{scheme}' contradicts quantize.scheme '{quantize.scheme}'")
        recipe.scheme = TransloadConfig(scheme=scheme).scheme
    return recipe


def _spread(
    path: str | Path,
    plan: Plan | Mapping[str, str | int] | str | None,
    device: str,
    recipe: TransloadConfig | None,
    quantized: bool,
    folder: str | Path | None,
) -> Spread | None:
    """Where the modules go, None when nothing was asked for. Raises ConfigError when a device was asked for as well."""
    if plan is None:
        return None
    if device != "auto":
        raise ConfigError(f"device '{device}' and a plan were both given: the plan names the devices")
    if isinstance(plan, Mapping):
        return Spread(plan, folder)
    if isinstance(plan, str):
        if plan != "auto":
            raise ConfigError(f"plan '{plan:.40}': give a Plan, a device_map, or 'auto'")
        from transload.plan.discover import this_machine
        from transload.plan.planner import plan as make_plan

        rounded = f"int{recipe.bits}-g{recipe.group_size}" if recipe is not None and not quantized else None
        plan = make_plan(path, this_machine(), recipe=rounded)
    return Spread(plan.device_map(), folder)


def _device_map(spread: Spread | None, recipe: TransloadConfig | None, one: torch.device) -> dict[str, Any]:
    """What transformers is told: all of a float model's places; of a quantized one only where float tensors arrive."""
    if spread is None:
        return {"": one}
    return {"": torch.device("cpu")} if recipe is not None else spread.for_floats()


def model_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration without its quantization, which is read by Transload and not by transformers."""
    fields = without_quantization(checkpoint.config)
    if "auto_map" in fields and trust_remote_code:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise FormatError(f"{checkpoint.path}: config.json is missing or has no model_type, so no model can be built")
    if (reason := not_in_transformers(fields)) is not None:
        raise Unsupported(f"{checkpoint.path}: {reason}")
    try:
        return AutoConfig.for_model(SAME_MODEL.get(model_type, model_type), **fields)
    except StrictDataclassError as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"{checkpoint.path}: transformers does not take this config.json: {reason}") from e
    except ValueError as e:
        raise Unsupported(
            f"{checkpoint.path}: transformers {transformers.__version__} has no model '{model_type}': {e}"
        ) from e


def model_class(config: PretrainedConfig, folder: Path) -> Any:
    """The model class that config.json names, else the one transformers has for text generation."""
    custom = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in custom:
        return get_class_from_dynamic_module(custom["AutoModelForCausalLM"], folder)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise Unsupported(f"transformers {transformers.__version__} has no generating model for '{config.model_type}'")


def _default_dtype(config: PretrainedConfig, checkpoint: Checkpoint, device: Device, quantized: bool) -> torch.dtype:
    """float32 where a quantized model runs on the CPU, whose kernels compute in it; else the checkpoint's own."""
    if quantized and device.backend == "cpu":
        return torch.float32
    own = config.dtype if isinstance(config.dtype, torch.dtype) else None
    floats = [e.dtype for e in checkpoint.entries.values() if e.spec is None and len(e.shape) > 1]
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(floats[0] if floats else "")
    fallback = torch.float32 if device.backend == "cpu" else torch.bfloat16
    return own or stored or fallback


@contextmanager
def _named_gaps(checkpoint: Checkpoint, spread: Spread | None) -> Iterator[None]:
    """Turns accelerate's complaint about modules that a device_map leaves out into a ConfigError."""
    try:
        yield
    except ValueError as e:
        if spread is None or "device_map" not in str(e):
            raise
        raise ConfigError(f"{checkpoint.path}: the plan leaves modules without a place: {str(e)[:300]}") from e


@contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers' progress bar covers the float tensors alone; `progress` covers everything."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
