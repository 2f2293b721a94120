"""Reading one field of a foreign config.json: typed, bounded, and naming file and field in every error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transload.errors import ConfigError

# No dimension of a language model comes near this; larger numbers are damage or an attack.
LARGEST = 1 << 31
MOST_LAYERS = 10_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fields:
    """A parsed config.json and the name to call it in errors."""

    values: Mapping[str, object]
    source: str

    def inside(self, name: str) -> Fields:
        """The fields of a nested object."""
        nested = self.values.get(name)
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{self.source}: '{name}' is {type(nested).__name__}, expected an object")
        return Fields(nested, f"{self.source}: {name}")

    def count(self, *names: str, default: int | None = None) -> int:
        """A non-negative integer under the first of `names` that is present and not null; positive without a default.

        Raises ConfigError when all are missing and there is no default, or when the value is not a sensible count.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            limit = MOST_LAYERS if name in ("num_hidden_layers", "num_layers") else LARGEST
            lowest = 0 if default is not None else 1
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= limit:
                raise ConfigError(f"{self.source}: '{name}' is {value!r:.40}, expected an integer {lowest} to {limit}")
            return value
        if default is None:
            raise ConfigError(f"{self.source}: field '{' or '.join(names)}' is missing and cannot be derived")
        return default

    def flag(self, *names: str, default: bool) -> bool:
        """A boolean under the first of `names` that is present."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, bool):
                return value
        return default

    def text(self, name: str, default: str) -> str:
        """A string, or the default when it is missing or something else."""
        value = self.values.get(name)
        return value if isinstance(value, str) else default

    def integers(self, name: str) -> list[int]:
        """A list of integers, empty when missing."""
        value = self.values.get(name)
        return [v for v in value if isinstance(v, int)] if isinstance(value, list) else []

    def per_layer(self, name: str, layers: int, words: Mapping[str, T], default: Sequence[str]) -> tuple[T, ...]:
        """One value a layer: the list under `name` (or `default`), translated by `words`.

        Raises ConfigError when the list is shorter than the model or holds an unknown word.
        """
        given = self.values.get(name)
        listed = given if isinstance(given, list) else default
        if len(listed) < layers:
            raise ConfigError(f"{self.source}: '{name}' lists {len(listed)} layers, the model has {layers}")
        unknown = next((w for w in listed[:layers] if w not in words), None)
        if unknown is not None:
            raise ConfigError(f"{self.source}: '{name}' holds {unknown!r:.40}, known are {', '.join(words)}")
        return tuple(words[w] for w in listed[:layers])
