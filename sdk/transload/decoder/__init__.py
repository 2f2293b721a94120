"""ONNX graphs of decoder-only language models, for onnxruntime alone: shapes, graph, and what generators need to know.

The graph has onnxruntime-genai's inputs and outputs: input_ids, attention_mask and a key and value cache per layer.
"""

from transload.decoder.genai import genai_config
from transload.decoder.model import decoder_graph
from transload.decoder.shape import DecoderShape, decoder_shape
from transload.decoder.weights import Weights

__all__ = ["DecoderShape", "Weights", "decoder_graph", "decoder_shape", "genai_config"]
