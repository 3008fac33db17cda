"""Timing a model beside another: prompts, decode steps, cache bytes, peak memory."""

from onnx_tricks.bench.compare import compare
from onnx_tricks.bench.report import print_comparison, to_dict
from onnx_tricks.bench.results import Comparison, Measurement, Refusal
from onnx_tricks.bench.workload import Workload

__all__ = [
    "Comparison",
    "Measurement",
    "Refusal",
    "Workload",
    "compare",
    "print_comparison",
    "to_dict",
]
