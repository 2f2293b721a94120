"""Tensor headers without weights and without torch: names, dtypes, shapes and byte ranges of a checkpoint.

Every reader here is strict (what it returns lies inside the file, overlaps nothing and has the size that its dtype
and shape ask for) and bounded (memory follows the header's real size, never a number written in it).
"""

from transload.headers.folder import checkpoint_files, find_index, is_gguf, read_headers
from transload.headers.gguf import GgufHeader, GgufMetadata, read_gguf_header
from transload.headers.info import TensorInfo
from transload.headers.jsonfile import read_json
from transload.headers.safetensors import DTYPE_BITS, read_safetensors_header

__all__ = [
    "DTYPE_BITS",
    "GgufHeader",
    "GgufMetadata",
    "TensorInfo",
    "checkpoint_files",
    "find_index",
    "is_gguf",
    "read_gguf_header",
    "read_headers",
    "read_json",
    "read_safetensors_header",
]
