"""Running quantized models through transformers: its model code, our linears, embeddings and experts.

Importing this package registers the quantization method "transload" with transformers, so that
`from_pretrained(path, quantization_config=TransloadConfig(...))` and `from_pretrained(saved_by_us)` work.
"""

from transload.runtime.config import TransloadConfig
from transload.runtime.quantizer import TransloadQuantizer

__all__ = ["TransloadConfig", "TransloadQuantizer"]
