"""Reading YAML that a person wrote: bounded in size, without anchors that could grow or loop."""

from __future__ import annotations

from pathlib import Path

import yaml

from transload.errors import ConfigError

LARGEST_FILE = 4 << 20


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, so that a document is a finite tree no larger than its text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.AliasEvent = self.get_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise ConfigError(f"line {line}: aliases (*{event.anchor}) are not accepted; write it out")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> object:
    """The parsed document. Raises ConfigError for missing, oversized, malformed or self-referring files."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ConfigError(f"{path}: {size} bytes, more than the {LARGEST_FILE} that a cluster file may have")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
