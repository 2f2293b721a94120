"""The float tensors of a checkpoint as the state dict that transformers loads from: read when asked, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType

from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.formats.base import Entry
from transload.runtime.trace import expert_name


class LazyTensor:
    """What transformers asks of a tensor that is still in a file: its dtype, and the whole of it."""

    def __init__(self, entry: Entry, read: Callable[[], Tensor]) -> None:
        self._dtype, self._read = entry.dtype, read

    def get_dtype(self) -> str:
        """The dtype in safetensors' spelling."""
        return self._dtype

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        return self._read()


class _Stack:
    """A stack of experts that is handed out one by one: read at the first, let go after the last."""

    def __init__(self, checkpoint: Checkpoint, entry: Entry) -> None:
        self._checkpoint, self._entry = checkpoint, entry
        self._whole: Tensor | None = None

    def reader(self, expert: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            whole = self._checkpoint.read(self._entry) if self._whole is None else self._whole
            self._whole = None if expert == len(whole) - 1 else whole
            return whole[expert].clone()

        return read


def float_state(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every float tensor by its Hugging Face name; a GGUF file's stack of experts under one name per expert."""
    state: dict[str, LazyTensor] = {}
    for name, entry in checkpoint.entries.items():
        if entry.spec is not None:
            continue
        if checkpoint.source.container == "gguf" and ".experts." in name and len(entry.shape) == 3:
            stack, module = _Stack(checkpoint, entry), name.removesuffix(".weight")
            for e in range(entry.shape[0]):
                state[expert_name(module, e) + ".weight"] = LazyTensor(entry, stack.reader(e))
        else:
            state[name] = LazyTensor(entry, _reader(checkpoint, entry))
    return state


def _reader(checkpoint: Checkpoint, entry: Entry) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(entry)
