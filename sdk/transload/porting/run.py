"""`port`: read a module, give it its new form, write it, forget it; then reopen the result and compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.errors import ConfigError
from transload.porting.container import Container
from transload.porting.folder import Folder
from transload.porting.gguf_file import GgufFile
from transload.porting.job import Job
from transload.porting.onnx_folder import OnnxFolder
from transload.porting.plan import Options
from transload.porting.planning import plan_first
from transload.porting.refusal import refused
from transload.porting.report import PortReport
from transload.porting.schemes import Requantize, parse_schemes
from transload.porting.target import find_targets
from transload.quant import ActSpec
from transload.writer import Writer

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done
_CONTAINERS: dict[str, type[Container]] = {"safetensors": Folder, "gguf": GgufFile, "onnx": OnnxFolder}
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ACTIVATIONS: dict[str, tuple[ActSpec | None] | None] = {"keep": None, "int8": (ActSpec(),), "16bit": (None,)}


def port(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    arch: str | None = None,
    requantize: Requantize | None = None,
    requantize_all: bool = False,
    floats: str = "fp32",
    activations: str = "keep",
    layout: str = "stored",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> PortReport:
    """Writes the checkpoint at `src` to the folder `dst` for the target `to`, number for number.

    to: a format ("compressed-tensors", "fp32") or an engine ("vllm", "vllm-ascend==0.23"), whose format is chosen and
    whose limits count; arch: the hardware that it runs on ("sm90", "amx", "310p").

    requantize: for modules that the target cannot hold exactly, a scheme ("int4-g128", see `requantize.parse_spec`),
    schemes by role or name ({"attention": "int8-channel-a8", "experts": "int4-channel-a8"}, see `porting.schemes`), or
    "auto", the target's own choice. requantize_all: for every linear, float ones too. floats: dtype of quantized
    tensors that the target keeps in float (embeddings): fp32 is exact, bf16 and fp16 round and are reported.
    activations: "keep" the source's, or declare "int8" (dynamic, per token) or "16bit"; weights stay as they are.
    layout: "stored" keeps the names of the source; "native" and "remote" move between ChatGLM's own layout and
    transformers' `glm` (see `transload.open`). resume: continue a killed port of the same job.
    progress: called with bytes done, bytes in all, and the module at work.

    The folder appears when it is complete and has been read back and compared. Raises CannotHold, before anything is
    written, with every module that the format cannot hold; FormatError for a broken source; OutputExists.

        report = transload.port("model.gguf", "model-ct", to="compressed-tensors")
    """
    began = time.monotonic()
    if floats not in FLOATS:
        raise ConfigError(f"floats '{floats}': give one of {', '.join(FLOATS)}")
    if activations not in _ACTIVATIONS:
        raise ConfigError(f"activations '{activations}': give one of {', '.join(_ACTIVATIONS)}")
    schemes = parse_schemes(requantize)
    if requantize_all and schemes is None:
        raise ConfigError("requantize_all without requantize: give the scheme, for example requantize='int4-g128'")
    targets = find_targets(to, arch)
    source = open_checkpoint(src, layout)
    options = Options(None, requantize_all, FLOATS[floats], _ACTIVATIONS[activations])
    plan = plan_first(source, targets, options, schemes)
    container = _CONTAINERS[plan.format.container](source, plan, Path(dst))
    if plan.refusals:
        raise refused(source, plan, schemes)
    job = Job(container, progress or (lambda done, total, what: None))
    identity = f"{source.path.resolve()} {_stamp(source)} {to} {arch} {layout} {plan.options}"
    laid_out = container.layout()
    with Writer(dst, laid_out, source=source.path, overwrite=overwrite, resume=resume, job=identity) as writer:
        job.write(writer)
        writer.flush()  # reaches the disk while it is read back
        job.compare(writer)
    return job.report(time.monotonic() - began)


def _stamp(source: Checkpoint) -> str:
    """Sizes and times of the source's files: a resumed port must read what the first run read."""
    files = sorted({info.file for info in source.source.infos.values()})
    return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
