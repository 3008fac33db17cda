"""The operators' kernels for the CPU by themselves, against the machine's rate of fp32 products.

    python benchmarks/operator_cpu.py [--rounds 15] [--threads 1] [--library FILE]

Every row times one node in ONNX Runtime, and a MatMul of 1024 x 1024 x 1024 in turn; a rate is that
of the operator's own multiplications, a share is that of the MatMul's rate in the same round, in
the median of all rounds. Threads that wait for more work spin for a while: a round is a pause, in
which those of the other have stopped, one run that wakes its own, and the median of a few more.
With one thread, times are the processor's, which other programs do not lengthen. Bytes are what one
step reads of its cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from onnx_tricks.runtime.library import op_library_path

_PAUSE = 0.1  # seconds; ONNX Runtime's threads spin for less than half of that
_RUNS = 5
_NUMBERS = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One node: its operator and sizes."""

    name: str
    batch: int
    heads: int
    new: int
    total: int
    head: int
    hidden: int = 0
    rank: int = 0
    cache: str = "fp32"

    @property
    def width(self) -> int:
        """Channels of a cached token."""
        return self.hidden or self.heads * self.head + self.rank

    @property
    def products(self) -> float:
        """Multiplications of the way that takes fewer: on the cache as it is, or on K and V."""
        rows, head, width = self.heads * self.new, self.head, self.width
        scored, weighed = (width, head) if self.hidden else (head, 0)
        absorbed = rows * (self.total * (scored + width) + width * (head + weighed))
        made = self.heads * width * (head + weighed)
        return self.batch * min(absorbed, self.total * (2 * rows * head + made))


_CASES = [
    *(Case("SlimCrossAttention", b, 6, 1, 1500, 64, 384) for b in (1, 8, 32)),
    *(Case("SlimCrossAttention", b, 6, 1, 1500, 64, 384, cache="fp16") for b in (1, 8, 32)),
    *(Case("SlimHiddenAttention", b, 6, 1, 1500, 64, 384) for b in (1, 8, 32)),
    *(Case("SlimAttention", b, 6, 1, 4097, 32, rank=8) for b in (1, 8)),
    Case("SlimAttention", 8, 6, 512, 512, 32, rank=8),
    Case("SlimHiddenAttention", 1, 6, 448, 448, 64, 384),
]


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    batch, heads, new, head = case.batch, case.heads, case.new, case.head
    past = case.total - new
    shapes: dict[str, tuple[int, ...]] = {"query": (batch, heads, new, head)}
    if case.name == "SlimAttention":
        return shapes | {
            "key": (batch, heads, new, head),
            "past_key": (batch, heads, past, head),
            "value_weight": (heads, case.width, head),
            "cos": (1, case.total, head // 2),
            "sin": (1, case.total, head // 2),
            "bias": (1, 1, new, case.total),
            "residual": (batch, new, case.rank),
            "past_residual": (batch, past, case.rank),
        }
    own = case.total if case.name == "SlimCrossAttention" else new
    shapes["hidden"] = (batch, own, case.hidden)
    if case.name == "SlimHiddenAttention":
        shapes["past_hidden"] = (batch, past, case.hidden)
    return shapes | {
        "key_weight": (heads, head, case.hidden),
        "value_weight": (heads, case.hidden, head),
    }


class Node:
    """A node of an operator with everything bound."""

    def __init__(self, case: Case, threads: int, library: Path) -> None:
        element, numbers = _NUMBERS[case.cache]
        random = np.random.default_rng(0)
        inputs, feeds, weights = [], {}, []
        for name, shape in _shapes(case).items():
            cached = "past" in name or (case.name, name) == ("SlimCrossAttention", "hidden")
            array = random.standard_normal(shape).astype(numbers if cached else np.float32)
            if name == "bias" and case.new > 1:
                array = np.triu(np.full(shape[2:], -np.inf, np.float32), 1)[None, None]
            if "weight" in name:
                weights.append(onnx.numpy_helper.from_array(array / 20, name))
            else:
                kind = element if cached else TensorProto.FLOAT
                inputs.append(helper.make_tensor_value_info(name, kind, shape))
                feeds[name] = array
        names = ["output"]
        names += {"SlimAttention": ["present_key", "present_residual"]}.get(
            case.name, ["present"] * (case.name == "SlimHiddenAttention")
        )
        node = helper.make_node(
            case.name, list(_shapes(case)), names, domain="onnx_tricks", scale=case.head**-0.5
        )
        outputs = [
            helper.make_tensor_value_info(n, element if "present" in n else TensorProto.FLOAT, None)
            for n in names
        ]
        graph = helper.make_graph([node], "one", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("onnx_tricks", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        self.turn = _bound(model, feeds, threads, library)


def _bound(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    threads: int,
    library: Path | None = None,
) -> Callable[[], float]:
    """What makes a model ready, and returns the seconds of a run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    clock = time.process_time if threads == 1 else time.perf_counter
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    binding = session.io_binding()
    held = []
    for name, array in feeds.items():
        # In the runtime's own memory, as caches that a step before has left.
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype)
        value.update_inplace(array)
        binding.bind_ortvalue_input(name, value)
        held.append(value)
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def run() -> float:
        start = clock()
        session.run_with_iobinding(binding)
        assert held
        return clock() - start

    def turn() -> float:
        time.sleep(_PAUSE)
        run()
        return statistics.median(run() for _ in range(_RUNS))

    return turn


def product(threads: int, size: int = 1024) -> Callable[[], float]:
    """A square MatMul: what returns the seconds of a run."""
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, (size, size))  # noqa: E731
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", [info("a"), info("b")], [info("c")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    array = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return _bound(model, {"a": array, "b": array}, threads)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime chooses")
    parser.add_argument("--library", type=Path)
    arguments = parser.parse_args()
    library = arguments.library or op_library_path()
    table = Table(
        "operator", "batch", "new", "total", "cache", "ms (range)", "GMAC/s", "share", "GB/s"
    )
    multiply = product(arguments.threads)
    rates = []
    for case in _CASES:
        node = Node(case, arguments.threads, library)
        times, products = zip(
            *((node.turn(), multiply()) for _ in range(arguments.rounds)), strict=True
        )
        rates += [1024**3 / seconds for seconds in products]
        shares = [
            case.products / spent * seconds / 1024**3
            for spent, seconds in zip(times, products, strict=True)
        ]
        seconds = statistics.median(times)
        size = 2 if case.cache == "fp16" else 4
        table.add_row(
            *(case.name, str(case.batch), str(case.new), str(case.total), case.cache),
            f"{seconds * 1e3:.2f} ({min(times) * 1e3:.2f}-{max(times) * 1e3:.2f})",
            *(f"{case.products / seconds / 1e9:.0f}", f"{statistics.median(shares):.0%}"),
            f"{case.batch * case.total * case.width * size / seconds / 1e9:.1f}",
        )
    Console(width=110).print(table)
    rate = statistics.median(rates) / 1e9
    print(f"ONNX Runtime {onnxruntime.__version__}, MatMul {rate:.0f} GMAC/s")


if __name__ == "__main__":
    main()
