"""The native kernels inside vLLM on a CPU, through its public `register_linear_kernel`: one more in its list.

vLLM asks its own kernels first and takes the first that can. So this one runs what they refuse (8-bit weights with
16-bit activations, sizes that are no multiple of 32), and everything when vLLM is told to leave its own out:

    VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel vllm serve ...

TRANSLOAD_VLLM_W4A8=1 quantizes activations to int8 per token (W4A8, W8A8), which is faster and less exact; without it
they keep 16 bits. vLLM finds `register` by the entry point group vllm.general_plugins and calls it in every process.
"""

from __future__ import annotations

import logging

log = logging.getLogger("vllm.transload")
ACTIVATIONS = "TRANSLOAD_VLLM_W4A8"


def register() -> None:
    """Adds the kernel on CPUs where the native library works; says why not in the log, and never raises."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if not current_platform.is_cpu():
            return
        from vllm.model_executor.kernels.linear import register_linear_kernel
    except ImportError as error:
        log.warning("transload: this vLLM has no register_linear_kernel (%s); its own kernels run alone", error)
        return
    from transload_cpu.vllm_kernel import TransloadLinearKernel, chosen

    if isinstance(chosen(), str):
        log.warning("transload: no kernel for vLLM: %s", chosen())
    elif not getattr(register, "done", False):
        register_linear_kernel(TransloadLinearKernel, PlatformEnum.CPU, "mp")
        register.done = True  # type: ignore[attr-defined]
