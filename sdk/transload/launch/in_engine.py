"""Runs inside vLLM's own environment: judges command lines by vLLM's parser and configuration. Imports no Transload.

stdin: JSON {"commands": [{"argv": [...], "folder": path or null, "env": {...}}]}; argv is what follows `vllm serve`,
folder has the model's config.json, env are variables that the configuration reads. stdout: {"version": ...} and then,
for every command, {"parser": error or null, "config": error or null, "facts": {...} or null}, one a line after the word
RESULT.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Sizes are judged, not this machine: several ranks may share its few cores.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def tell(value: object) -> None:
    """One line of the answer."""
    print("RESULT " + json.dumps(value), flush=True)


def stand_in_for_ascend() -> None:
    """Makes --quantization ascend known where its plug-in is not installed, so that the other arguments are judged."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
        register_quantization_config,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if "ascend" in QUANTIZATION_METHODS:
        return
    dtypes = get_quantization_config("fp8")().get_supported_act_dtypes()

    class StandIn(QuantizationConfig):  # type: ignore[misc]
        """Knows its name and takes every model."""

        def get_name(self) -> str:
            return "ascend"

        def get_supported_act_dtypes(self) -> list[object]:
            return list(dtypes)

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: object) -> StandIn:
            return cls()

        def get_quant_method(self, layer: object, prefix: str) -> None:
            return None

    register_quantization_config("ascend")(StandIn)


def make_parser() -> tuple[Any, Callable[[Namespace], None]]:
    """The parser of `vllm serve`, and its own check of what was parsed."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers import cli_args
    except ImportError:
        from vllm.entrypoints.openai import cli_args
    return cli_args.make_arg_parser(FlexibleArgumentParser(prog="vllm serve")), cli_args.validate_parsed_serve_args


def parsed(
    parser: Any, validate: Callable[[Namespace], None], argv: Sequence[str]
) -> tuple[Namespace | None, str | None]:
    """(arguments, None) or (None, what the parser says)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(list(argv))
            validate(args)
        return args, None
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if "error:" in line]
        return None, (lines or said.getvalue().splitlines() or ["refused"])[-1].split("error:")[-1].strip()
    except Exception as error:
        return None, one_line(error)


def configured(args: Namespace, folder: str) -> tuple[Mapping[str, object] | None, str | None]:
    """(facts about the engine's configuration, None) or (None, why there is none)."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args.model = folder
    args.tokenizer = None
    args.skip_tokenizer_init = True
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=args.headless)
    except (Exception, SystemExit) as error:
        return None, one_line(error)
    p, m = config.parallel_config, config.model_config
    return {
        "world_size": p.world_size,
        "local_world_size": p.local_world_size,
        "data_parallel_size": p.data_parallel_size,
        "data_parallel_size_local": p.data_parallel_size_local,
        "max_model_len": m.max_model_len,
        "kv_heads": m.get_num_kv_heads(p),
        "layers": m.get_num_layers(p),
        "quantization": m.quantization,
    }, None


def one_line(error: BaseException) -> str:
    """An exception's text, without what pydantic says around it."""
    text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:]
    return " ".join(lines).split(" [type=")[0].removeprefix("Value error, ")[:600]


def main() -> None:
    """Judges every command of stdin."""
    asked = json.load(sys.stdin)["commands"]
    import vllm

    tell({"version": vllm.__version__})
    stand_in_for_ascend()
    parser, validate = make_parser()
    for command in asked:
        args, refusal = parsed(parser, validate, command["argv"])
        facts, why = None, None
        if args is not None and command["folder"] is not None:
            os.environ.update(command["env"])
            facts, why = configured(args, command["folder"])
            for name in command["env"]:
                del os.environ[name]
        tell({"parser": refusal, "config": why, "facts": facts})
    os._exit(0)  # vLLM leaves threads behind


if __name__ == "__main__":
    main()
