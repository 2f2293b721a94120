"""Running quantized models through transformers: its model code, our linears, embeddings and experts.

Importing this package registers the quantization method "transload" with transformers, so that
`from_pretrained(path, quantization_config=TransloadConfig(...))` and `from_pretrained(saved_by_us)` work.
"""

from transload.runtime.config import TransloadConfig
from transload.runtime.generation import Generation, generate, stream
from transload.runtime.linear import QuantLinear
from transload.runtime.loading import load
from transload.runtime.quantizer import TransloadQuantizer
from transload.runtime.reporting import Report, report
from transload.runtime.tokenizers import tokenizer

__all__ = [
    "Generation",
    "QuantLinear",
    "Report",
    "TransloadConfig",
    "TransloadQuantizer",
    "generate",
    "load",
    "report",
    "stream",
    "tokenizer",
]
