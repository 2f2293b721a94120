"""Reading YAML that a person wrote: bounded in size, without anchors that could grow or loop."""

from __future__ import annotations

from pathlib import Path

import yaml

from transload.errors import ConfigError

LARGEST_FILE = 4 << 20
MOST_DEPTH = 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads a file of this size in seconds


def _finite(text: str) -> None:
    """Refuses aliases, so that a document is a finite tree no larger than its text, and towers of brackets."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"line {line}: aliases (*{event.anchor}) are not accepted; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_DEPTH:
            raise ConfigError(f"line {line}: not valid YAML for this: nested deeper than {MOST_DEPTH}")


def read_yaml(path: Path) -> object:
    """The parsed document. Raises ConfigError for missing, oversized, malformed or self-referring files."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ConfigError(f"{path}: {size} bytes, more than the {LARGEST_FILE} that a cluster file may have")
        text = path.read_text(encoding="utf-8")
        _finite(text)
        return yaml.load(text, Loader=_LOADER)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
