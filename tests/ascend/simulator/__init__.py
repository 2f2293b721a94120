"""An NPU without an NPU: the real torch_npu on stub CANN libraries, with the documented arithmetic as CPU kernels."""
