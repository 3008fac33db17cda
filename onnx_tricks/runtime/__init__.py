"""Running models in ONNX Runtime: sessions, decoders and their caches, generation."""

from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.generation import Sampling, generate

__all__ = ["Decoder", "Sampling", "generate"]
