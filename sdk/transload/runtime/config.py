"""TransloadConfig: what `quantization_config=` takes, and what a saved model's config.json holds.

Transformers keeps quantization settings in one object with two lives. As a request it says how float weights are to be
quantized on load. In a saved model it carries the neutral format's description of what is stored (`schemes`), and the
request's fields then only say how the stored weights are to be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from transload.checkpoint import Checkpoint
from transload.errors import ConfigError
from transload.formats.neutral import NEEDS
from transload.quant import PER_CHANNEL, SCALE_DTYPES, QuantSpec, Zero
from transload.runtime.placement import SCHEMES
from transload.runtime.spread import Spread

if TYPE_CHECKING:
    from transload.runtime.packed_cache import PackedCache

Progress = Callable[[int, int], None]  # bytes of the checkpoint that are in place, of how many
Reading = tuple[Checkpoint | None, Progress | None, "PackedCache | None"]

METHOD = "transload"
_SMALLER_GROUPS = (128, 64, 32, 16)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}


@register_quantization_config(METHOD)
class TransloadConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantize a float model while it loads, and run it on whatever is there.

    bits: 2 to 8. group_size: neighbouring inputs that share a scale, -1 = the whole row; where it does not divide a
    layer's inputs, the next smaller of 64, 32, 16 that does is taken and reported. symmetric: False gives every group
    an integer zero point. scheme: "w4a16" or "w4a8" (dynamic int8 activations), whatever the bits; None means w4a16
    for float models and, for stored ones, what is stored.
    device: "auto", "cpu", "cuda:1", "npu:0"; a device_map given to from_pretrained comes first.
    skip_modules: more modules to keep in float, as names or runs of whole name components ("layers.0"), or "re:..."
    for a regular expression. Routers, vision and audio towers, projectors, output heads and embeddings stay in float
    anyway. modules_to_not_convert: transformers' name for the same.
    quantize_head: quantize the output head too, and the embedding where the two are tied.

    >>> TransloadConfig(bits=4, group_size=64).spec(896).group_size
    64
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        scheme: str | None = None,
        device: str = "auto",
        skip_modules: list[str] | None = None,
        quantize_head: bool = False,
        scale_dtype: str = "float16",
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
        version: int | None = None,
        schemes: list[dict[str, object]] | None = None,
        needs: str = NEEDS,
    ) -> None:
        if quant_method != METHOD:
            raise ConfigError(f"TransloadConfig with quant_method '{quant_method}': it is for '{METHOD}'")
        if scheme is not None and scheme.lower() not in SCHEMES:
            raise ConfigError(f"scheme '{scheme}': there are {', '.join(SCHEMES)} and None")
        if scale_dtype not in _DTYPES:
            raise ConfigError(f"scale_dtype '{scale_dtype}': there are {', '.join(_DTYPES)}")
        self.quant_method = METHOD
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.scheme = scheme and scheme.lower()
        self.device, self.quantize_head, self.scale_dtype = device, quantize_head, scale_dtype
        self.skip_modules = [*(skip_modules or ()), *(modules_to_not_convert or ())]
        self.version, self.schemes = version, schemes
        self._reading: Reading = (None, None, None)
        self._spread: Spread | None = None
        self._spec(group_size)  # raises ConfigError for impossible bits and groups

    def spec(self, k: int) -> QuantSpec:
        """The scheme for a layer with k inputs. Raises ConfigError when no group size divides k."""
        if self.group_size == PER_CHANNEL:
            return self._spec(PER_CHANNEL)
        smaller = [g for g in _SMALLER_GROUPS if g < self.group_size]
        for size in (self.group_size, *smaller):
            if k % size == 0:
                return self._spec(size)
        tried = ", ".join(str(g) for g in (self.group_size, *smaller))
        raise ConfigError(f"{k} inputs do not divide into groups of {tried}")

    def _spec(self, group_size: int) -> QuantSpec:
        zero = Zero.MIDPOINT if self.symmetric else Zero.CODES
        return QuantSpec(self.bits, group_size, zero=zero, scale_dtype=_DTYPES[self.scale_dtype])

    def reading(
        self, checkpoint: Checkpoint, progress: Progress | None = None, cache: PackedCache | None = None
    ) -> None:
        """Makes this the configuration for a checkpoint of any format, whose quantized modules keep their numbers."""
        self._reading = (checkpoint, progress, cache)

    def take_reading(self) -> Reading:
        """What `reading` was given, once: it does not stay with a configuration that models keep and copy."""
        taken, self._reading = self._reading, (None, None, None)
        return taken

    def spreading(self, spread: Spread) -> None:
        """Makes this the configuration for a model that lies on several devices, or partly on disk."""
        self._spread = spread

    def take_spread(self) -> Spread | None:
        """What `spreading` was given, once."""
        taken, self._spread = self._spread, None
        return taken

    @property
    def stored(self) -> bool:
        """True when this describes a saved model rather than a wish."""
        return self.schemes is not None

    def describe(self, quantization_config: dict[str, Any]) -> None:
        """Takes over the neutral format's description of what is being saved."""
        self.version, self.schemes = quantization_config["version"], quantization_config["schemes"]

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: for a stored model its description and how it was run, else the request."""
        if not self.stored:
            return {n: v for n, v in vars(self).items() if n not in ("version", "schemes") and not n.startswith("_")}
        kept: dict[str, Any] = {
            "quant_method": METHOD,
            "needs": NEEDS,
            "version": self.version,
            "schemes": self.schemes,
        }
        return kept | ({"scheme": self.scheme} if self.scheme else {})

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())
