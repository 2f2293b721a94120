"""Which scheme a module gets where its numbers may change: one for all, or one by role or by name.

    int4-g128                                            every module
    attention=int8-channel-a8, experts=int4-channel-a8   by role; modules that no pattern names keep their numbers
    re:.*\\.layers\\.0\\..*=int8-g32, int4-g128          by name, the rest in another scheme
    lm_head=float                                        stays, or becomes, float

A pattern is a role (`models.roles.ROLES`), a run of whole components of a name (layers.0, down_proj), a name with *,
or a regular expression for the whole name after re:. The first pattern that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from transload.errors import ConfigError
from transload.models.roles import ROLES, role_of
from transload.quant import QuantSpec
from transload.requantize import parse_spec

AUTO = "auto"
FLOAT = "float"
Requantize = str | QuantSpec | Mapping[str, str | QuantSpec] | Sequence[str]  # what callers may write


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme for the modules of a pattern; an empty pattern matches all. scheme None stands for float.

    up_to: the widest codes of the source that the choice is for; floats count as 16 bits.
    """

    pattern: str
    scheme: QuantSpec | None
    up_to: int = 16

    def matches(self, module: str, bits: int = 0) -> bool:
        """True when the choice is for a module with codes of `bits` bits."""
        pattern = self.pattern
        if bits > self.up_to:
            return False
        if not pattern:
            return True
        if pattern in ROLES:
            return role_of(module) == pattern
        if pattern.startswith("re:"):
            return re.fullmatch(pattern.removeprefix("re:"), module) is not None
        return fnmatchcase(module, pattern) if "*" in pattern else f".{pattern}." in f".{module}."

    def __str__(self) -> str:
        scheme = FLOAT if self.scheme is None else self.scheme
        return f"{self.pattern}={scheme}" if self.pattern else str(scheme)


@dataclass(frozen=True, slots=True)
class Schemes:
    """Choices in the order in which they are asked."""

    choices: tuple[Choice, ...]

    def of(self, module: str, bits: int = 0) -> Choice | None:
        """The first choice for a module with codes of `bits` bits, None when there is none."""
        return next((choice for choice in self.choices if choice.matches(module, bits)), None)

    def check(self, modules: Iterable[str]) -> None:
        """Raises ConfigError for a pattern that decides about none of these modules, naming the roles that are there.

        A pattern whose modules were all taken by earlier ones is an error as well: it has no effect.
        """
        names = list(modules)
        deciding = {self.of(name) for name in names}
        for choice in self.choices:
            if choice.pattern and choice not in deciding:
                taken = any(choice.matches(name) for name in names)
                why = "matches only modules that earlier patterns took" if taken else "matches no quantized module"
                roles = sorted({role for name in names if (role := role_of(name)) is not None})
                example = f", names like {names[0]}" if names else ""
                raise ConfigError(
                    f"requantize: pattern '{choice.pattern}' {why}; there are {', '.join(roles)}{example}"
                )

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))


def parse_schemes(value: Requantize | None) -> Schemes | str | None:
    """Schemes from what a caller or a command line gives; "auto" stays a word, and None stays None.

    A text may hold several choices after commas, unless one of them is an expression, which may hold commas itself.
    Raises ConfigError for what is no scheme or no pattern.

    >>> str(parse_schemes("experts=int4-channel-a8-fp32"))
    'experts=int4 channel sym float32 + int8 dynamic per token'
    """
    if value is None or value == AUTO:
        return value if value is None else AUTO
    if isinstance(value, QuantSpec):
        return Schemes((Choice("", value),))
    if isinstance(value, Mapping):
        return _checked([_choice(pattern, scheme) for pattern, scheme in value.items()])
    texts = [value] if isinstance(value, str) else list(value)
    if texts == [AUTO]:
        return AUTO
    items = [part for text in texts for part in ([text] if "re:" in text else text.split(","))]
    return _checked(
        [_choice(pattern, scheme) for pattern, _, scheme in (item.strip().rpartition("=") for item in items)]
    )


def _choice(pattern: str, scheme: str | QuantSpec) -> Choice:
    pattern = "" if pattern in ("", "*") else pattern.strip()
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as e:
            raise ConfigError(f"requantize: pattern '{pattern}': {e}") from e
    if isinstance(scheme, QuantSpec):
        return Choice(pattern, scheme)
    if scheme.strip() == AUTO:
        raise ConfigError("requantize: auto stands alone, without patterns and other schemes")
    return Choice(pattern, None if scheme.strip() == FLOAT else parse_spec(scheme))


def _checked(choices: Sequence[Choice]) -> Schemes:
    if not choices:
        raise ConfigError("requantize: no scheme given, for example int4-g128 or attention=int8-channel-a8")
    everything = [i for i, choice in enumerate(choices) if not choice.pattern]
    if everything and everything[0] != len(choices) - 1:
        raise ConfigError(f"requantize: '{choices[everything[0]]}' takes every module; put it after the patterns")
    return Schemes(tuple(choices))
