"""What deferring a norm's division costs or saves in ONNX Runtime, measured in pairs.

An RMSNorm in front of the linear layers of a block, as ONNX Runtime fuses it, and the same layers
with the division behind them, as defer-norm writes it. Runs are taken in turns. The products alone
are the floor: an operator that took the statistic along while it multiplies would come near it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import typer
from onnx import parser
from rich.console import Console
from rich.table import Table

from onnx_tricks.passes import DeferNorm
from onnx_tricks.rewrite import run_passes

__all__ = ["Block", "main", "measure"]

_BLOCKS = {"q, k, v": (1.0, 1.0, 1.0), "gate, up": (8 / 3, 8 / 3)}
_WIDTHS, _TOKENS = (576, 1024, 1536, 2048), (1, 512)
_SESSIONS = 4  # where its weights lie in memory makes one session some per cent faster than another


@dataclasses.dataclass(frozen=True)
class Block:
    """A norm and the linear layers that read it.

    Attributes:
        name: What the layers are.
        tokens: T.
        width: D.
        outputs: F of each layer.
    """

    name: str
    tokens: int
    width: int
    outputs: tuple[int, ...]

    def model(self, *, norm: bool) -> onnx.ModelProto:
        """The layers on rows [1, T, D] of float32, with the norm or without."""
        results = [f"y{index}" for index in range(len(self.outputs))]
        declared = ", ".join(
            f"float[1, {self.tokens}, {size}] {one}"
            for one, size in zip(results, self.outputs, strict=True)
        )
        body = "n = RMSNormalization<axis=-1, epsilon=0.000001>(x, ones)\n" if norm else ""
        body += "\n".join(
            f"{one} = MatMul({'n' if norm else 'x'}, w{index})" for index, one in enumerate(results)
        )
        proto = parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 23]>\n'
            f"block (float[1, {self.tokens}, {self.width}] x) => ({declared}) {{\n{body}\n}}"
        )
        rng = np.random.default_rng(0)
        arrays = {"ones": np.ones(self.width, dtype=np.float32)} if norm else {}
        for index, outputs in enumerate(self.outputs):
            shape = (self.width, outputs)
            arrays[f"w{index}"] = rng.standard_normal(shape, np.float32) / self.width**0.5
        tensors = [ir.to_proto(ir.tensor(array, name=name)) for name, array in arrays.items()]
        proto.graph.initializer.extend(tensors)
        return proto


def measure(block: Block, pairs: int) -> tuple[list[float], ...]:
    """Processor time of runs in seconds, round by round: fused norm, deferred norm, no norm."""
    fused = block.model(norm=True)
    deferred = ir.from_proto(fused)
    (result,) = run_passes(deferred, [DeferNorm()])
    assert result.count == 1, result.skipped
    models = (fused, ir.to_proto(deferred), block.model(norm=False))
    shape = (1, block.tokens, block.width)
    feeds = {"x": np.random.default_rng(1).standard_normal(shape, np.float32)}
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(_SESSIONS):
        sessions = [_session(model) for model in models]
        for session in sessions:
            _time(session, feeds)
        for _ in range(pairs if block.tokens > 1 else 40 * pairs):
            for session, found in zip(sessions, times, strict=True):
                found.append(_time(session, feeds))
    return times


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _time(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    # With one thread this is the calling one; what else runs on the machine takes none of its time.
    start = time.thread_time()
    session.run(None, feeds)
    return time.thread_time() - start


def _ratio(times: list[float], others: list[float]) -> str:
    """The median of ratios within rounds, and their quartiles."""
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def main(
    pairs: Annotated[
        int, typer.Option(help="Rounds a session with T = 512, 40 times as many with T = 1.")
    ] = 3,
) -> None:
    """Print the times, and what a fused operator would have to reach."""
    table = Table("layers", "T", "D", "fused norm ms", "deferred", "no norm")
    for name, factors in _BLOCKS.items():
        for tokens in _TOKENS:
            for width in _WIDTHS:
                outputs = tuple(round(width * factor) for factor in factors)
                fused, *others = measure(Block(name, tokens, width, outputs), pairs)
                median = f"{1e3 * statistics.median(fused):.3f}"
                ratios = [_ratio(one, fused) for one in others]
                table.add_row(name, str(tokens), str(width), median, *ratios)
    Console(width=100).print(table)
    print(f"ONNX Runtime {ort.__version__}, one thread, medians and quartiles of rounds")


if __name__ == "__main__":
    typer.run(main)
