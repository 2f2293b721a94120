"""The quantization method "transload" for transformers: what `from_pretrained` calls while it loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from transload import checkpoint as checkpoints
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError, FormatError, Unsupported
from transload.runtime import decoding
from transload.runtime.config import METHOD, TransloadConfig
from transload.runtime.placement import target
from transload.runtime.rtn import QuantizeOnLoad, RoundedWeights
from transload.runtime.save import stored_state
from transload.runtime.standins import unfilled
from transload.runtime.stored import StoredWeights
from transload.runtime.targets import Targets

# The neutral format's, read by Checkpoint instead; and scales of static activations, which are found anew here.
_STORED_NAMES = r"\.(codes|scales|zeros|mins|g_idx|shape|input_scale|input_zero_point)$"


@register_quantizer(METHOD)
class TransloadQuantizer(HfQuantizer):  # type: ignore[misc]
    """Two ways in: float weights are rounded as they arrive, stored ones come with their numbers."""

    requires_calibration = False
    quantization_config: TransloadConfig

    def __init__(self, quantization_config: TransloadConfig, pre_quantized: bool = True, **unused: object) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._checkpoint, self._progress, self._cache = quantization_config.take_reading()
        self._spread = quantization_config.take_spread()
        self.pre_quantized = quantization_config.stored or self._checkpoint is not None
        self._device_map: Mapping[str, Any] | None = None
        self._dtype = torch.float32
        self._rounded: RoundedWeights | None = None
        self._stored: StoredWeights | None = None
        self.kept: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.unused: list[str] = []
        self.cache_outcome = ""
        self._conversions: list[WeightTransform] = []

    def update_device_map(self, device_map: Any) -> Any:
        """A map as it is; no map or "auto": everything on the device of the configuration."""
        if isinstance(device_map, str) and device_map != "auto":
            raise Unsupported(f"device_map '{device_map}': give 'auto', a device, or a dict of devices by module")
        if not isinstance(device_map, dict):
            device_map = {"": target(self.quantization_config.device).torch_device}
        self._device_map = device_map
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remembers the dtype of the model's activations."""
        self._dtype = dtype
        return dtype

    @property
    def quantized_element_size(self) -> float:
        """Bytes per value, for transformers' estimates."""
        return self.quantization_config.bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **unused: object) -> bool:
        """True for parameters that are rounded on load."""
        return self._rounded is not None and param_name in self._rounded.specs

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """The conversion step for those parameters."""
        assert self._rounded is not None
        return QuantizeOnLoad(self._rounded)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **unused: object
    ) -> None:
        """Puts stand-ins into the model, which is still on the meta device."""
        config = self.quantization_config
        if self._spread is not None:
            self._spread.on(model)
        self._targets = Targets(target(config.device, config.scheme, self._dtype), self._device_map, self._spread)
        if not self.pre_quantized:
            self._rounded = RoundedWeights(config, model, self._targets)
            self.kept, self.notes = self._rounded.kept, self._rounded.notes
            return
        self._stored = StoredWeights(self._checkpoint or _open(checkpoint_files), model)
        self.kept = {name: f"stored quantized, used in float: {why}" for name, why in self._stored.floats.items()}
        self.unused = self._stored.unused
        _ignore(model, "_keys_to_ignore_on_load_unexpected", [_STORED_NAMES])
        late = [f"^{re.escape(name)}$" for name in self._stored.floats]
        _ignore(model, "_keys_to_ignore_on_load_missing", late)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: object) -> PreTrainedModel:
        """Brings the stored numbers in, and checks that every stand-in has its weight."""
        self._conversions = list(getattr(model, "_weight_conversions", None) or ())
        if self._stored is not None:
            self._stored.fill(model, self._targets, self._progress, self._cache)
            self.cache_outcome = self._cache.outcome if self._cache is not None else ""
            self._conversions = self._stored.conversions
            self._stored = self._checkpoint = self._progress = self._cache = None
        if missing := unfilled(model):
            raise FormatError(f"{model.name_or_path}: no weights for {missing[0]}, and {len(missing) - 1} more like it")
        decoding.attach(model, whole=self._spread is None)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: Transload's neutral format, every number as it is."""
        tensors, description = stored_state(model, self._conversions)
        self.quantization_config.describe(description)
        return tensors, {}

    def is_serializable(self) -> bool:
        """True: the neutral format holds every weight."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False


def _ignore(model: PreTrainedModel, attribute: str, patterns: list[str]) -> None:
    """Adds patterns to what transformers does not complain about, on this model; a list or a set, as it has it."""
    known = getattr(model, attribute)
    container = list if known is None else type(known)
    setattr(model, attribute, container([*(known or ()), *patterns]))


def _open(files: list[str] | None) -> Checkpoint:
    if not files:
        raise ConfigError("a stored transload model needs its files: give from_pretrained a path")
    return checkpoints.open(Path(files[0]).parent)
