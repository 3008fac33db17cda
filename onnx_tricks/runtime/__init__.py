"""Running models in ONNX Runtime: sessions, decoders and their caches, generation."""

from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.generation import Sampling, generate
from onnx_tricks.runtime.library import op_library_path, register

__all__ = ["Decoder", "Sampling", "generate", "op_library_path", "register"]
