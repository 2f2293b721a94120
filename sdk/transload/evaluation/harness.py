"""lm-evaluation-harness, when it is installed: its tasks on a model that Transload runs, from local data only."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transload.errors import ConfigError
from transload.runtime import load, tokenizer

if TYPE_CHECKING:
    from transload.evaluation.run import Request


def check_tasks(tasks: str | None) -> list[str]:
    """The names of a comma separated list. Raises ConfigError when there are some and the harness is not installed."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install lm_eval")
    return names


def run_tasks(asked: Request, names: list[str], folder: Path | None) -> dict[str, dict[str, float]]:
    """Task -> metric -> value. Nothing is downloaded: data sets must be in the local cache or in the task's files.

    folder: task files (YAML) of the user's own. Raises ConfigError for unknown tasks and data that is not here.
    """
    if not names:
        return {}
    # A data set that is missing must be an error, not a download. The harness reads these when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness has no task {', '.join(unknown)}: see `lm_eval ls tasks`")
    model = load(asked.path, asked.device, asked.scheme, dtype=asked.dtype, bits=asked.bits)
    harness = HFLM(pretrained=model, tokenizer=tokenizer(asked.path), batch_size=1)
    try:
        found: dict[str, Any] = simple_evaluate(model=harness, tasks=names, task_manager=manager, log_samples=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"the tasks {', '.join(names)} could not run: {e}; is their data on this machine?") from e
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name.split(",")[0]: float(v) for name, v in values.items() if isinstance(v, (int, float))}
