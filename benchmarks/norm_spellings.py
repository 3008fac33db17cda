"""Which spellings of RMSNorm and LayerNorm ONNX Runtime runs as one kernel, and what others cost.

Builds a norm in front of a narrow MatMul in every spelling that exporters use, opens it at full
optimisation, and prints the operators that are left and the time of a run. Times are taken in turns
with those of the operator that computes the norm by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import typer
from onnx import numpy_helper, parser
from rich.console import Console
from rich.table import Table

from onnx_tricks.graph.spell import write_norm

__all__ = ["Spelling", "main", "spellings"]

_EPSILON = 1e-6
_OUT = 8  # columns of the MatMul: enough to be one, too few to cost
_TYPES = {"float": (np.float32, 1), "float16": (np.float16, 10)}
_OPSETS = (14, 17, 18, 23)

_SQUARES = {"Pow": "square = Pow(centred, two)", "Mul": "square = Mul(centred, centred)"}
_ROOTS = {
    "x / Sqrt": "unit = Div(centred, root)",
    "x * (1 / Sqrt)": "inverse = Div(one, root) unit = Mul(centred, inverse)",
    "x * Reciprocal(Sqrt)": "inverse = Reciprocal(root) unit = Mul(centred, inverse)",
}
_TAILS = {
    "": "",
    "* 1": "scaled = Mul(narrow, ones)",
    "* 1 + 0": "scaled = Mul(narrow, ones) shifted = Add(scaled, zeros)",
}
_OPERATORS = {
    ("rms", 14): "SimplifiedLayerNormalization",
    ("rms", 23): "RMSNormalization",
    ("layer", 17): "LayerNormalization",
}
"""Operators that compute a norm by themselves, and the opset from which on (14: any)."""

_WRITTEN = "what fold-norm writes"


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write a norm without gain and bias.

    Attributes:
        kind: "rms" or "layer".
        opset: Version of the ONNX operator set.
        dtype: ONNX type of the input and the output; half types are normalised in float32.
        core: The operator that computes the norm, or the operators.
        tail: The multiplication by ones and the addition of zeros that stand for gain and bias.
    """

    kind: str
    opset: int
    dtype: str
    core: str
    tail: str

    def model(self, tokens: int, width: int) -> onnx.ModelProto:
        """The norm, of [1, tokens, width], in front of a MatMul to [1, tokens, 8]."""
        if self.core == _WRITTEN:
            model = ir.from_proto(self._parsed("narrow = Identity(x)", tokens, width))
            identity, matmul = model.graph
            norm = write_norm(
                model,
                identity,
                self.kind,
                model.graph.inputs[0],
                width=width,
                epsilon=_EPSILON,
                dtype=model.graph.inputs[0].dtype or ir.DataType.FLOAT,
                name="norm",
            )
            matmul.replace_input_with(0, norm)
            model.graph.remove(identity, safe=True)
            return ir.to_proto(model)
        if self.core in _OPERATORS.values():
            attributes = f"axis = -1, epsilon = {_EPSILON:f}"
            return self._parsed(f"narrow = {self.core} <{attributes}> (x, ones)", tokens, width)
        square, root = self.core.split(", ")
        parts = ["wide = Cast <to = 1> (x)" if self.dtype == "float16" else "wide = Identity(x)"]
        if self.kind == "layer":
            parts += [self._mean("centre", "wide"), "centred = Sub(wide, centre)"]
        else:
            parts += ["centred = Identity(wide)"]
        parts += [_SQUARES[square], self._mean("variance", "square")]
        parts += ["above = Add(variance, epsilon)", "root = Sqrt(above)", _ROOTS[root]]
        to = _TYPES[self.dtype][1]
        parts += [f"narrow = Cast <to = {to}> (unit)" if to != 1 else "narrow = Identity(unit)"]
        return self._parsed(" ".join([*parts, _TAILS[self.tail]]), tokens, width)

    def _mean(self, name: str, of: str) -> str:
        if self.opset < 18:
            return f"{name} = ReduceMean <axes = [-1]> ({of})"
        return f"{name} = ReduceMean ({of}, last_axis)"

    def _parsed(self, body: str, tokens: int, width: int) -> onnx.ModelProto:
        last = next(n for n in ("shifted", "scaled", "narrow") if f"{n} = " in body)
        model = parser.parse_model(
            f'<ir_version: 10, opset_import: ["": {self.opset}]> '
            f"g ({self.dtype}[1, {tokens}, {width}] x) => ({self.dtype}[1, {tokens}, {_OUT}] y) "
            f"{{ {body} y = MatMul({last}, weight) }}"
        )
        dtype = _TYPES[self.dtype][0]
        constants: dict[str, np.ndarray[Any, Any]] = {
            "weight": np.random.default_rng(0).normal(0, width**-0.5, (width, _OUT)).astype(dtype),
            "ones": np.ones(width, dtype),
            "zeros": np.zeros(width, dtype),
            "last_axis": np.array([-1]),
            "one": np.array(1, np.float32),
            "two": np.array(2, np.float32),
            "epsilon": np.array(_EPSILON, np.float32),
        }
        read = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(array, name)
            for name, array in constants.items()
            if name in read
        )
        return model


def spellings(kind: str, dtype: str) -> Iterator[Spelling]:
    """All spellings of one norm, the operators first."""
    for (of, since), operator in _OPERATORS.items():
        if of == kind:
            yield from (Spelling(kind, o, dtype, operator, "") for o in _OPSETS if o >= since)
    yield from (Spelling(kind, opset, dtype, _WRITTEN, "") for opset in _OPSETS)
    tails = ["", "* 1", "* 1 + 0"] if kind == "layer" else ["", "* 1"]
    for opset, square, root, tail in itertools.product(_OPSETS, _SQUARES, _ROOTS, tails):
        yield Spelling(kind, opset, dtype, f"{square}, {root}", tail)


class _Session:
    """A spelling in ONNX Runtime, on one thread."""

    def __init__(self, spelling: Spelling, tokens: int, width: int, folder: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        model = spelling.model(tokens, width).SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        left = onnx.load(options.optimized_model_filepath).graph.node
        self.operators = Counter(node.op_type for node in left)
        x = np.random.default_rng(1).normal(size=(1, tokens, width))
        self._feed = {"x": x.astype(_TYPES[spelling.dtype][0])}
        self.output = self.run()

    def run(self) -> np.ndarray[Any, Any]:
        (output,) = self._session.run(None, self._feed)
        return np.asarray(output)

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) * 1e3


def main(
    tokens: Annotated[int, typer.Option(help="Rows that are normalised.")] = 512,
    width: Annotated[int, typer.Option(help="Length of a row.")] = 2048,
    runs: Annotated[int, typer.Option(help="Runs per spelling.")] = 15,
) -> None:
    """Print what ONNX Runtime makes of each spelling of a norm."""
    console = Console(width=130)
    console.print(f"ONNX Runtime {ort.__version__}, CPU, one thread, [1, {tokens}, {width}]")
    for kind, dtype in itertools.product(("rms", "layer"), _TYPES):
        _print_table(kind, dtype, tokens, width, runs, console)


def _print_table(
    kind: str, dtype: str, tokens: int, width: int, runs: int, console: Console
) -> None:
    table = Table("spelling", "tail", "opsets", "operators left", title=f"{kind} norm, {dtype}")
    for name in ("ms", "times the operator"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base: _Session | None = None
        for spelling in spellings(kind, dtype):
            session = _Session(spelling, tokens, width, Path(folder))
            base = base or session
            tolerance = 1e-5 if dtype == "float" else 4e-3
            np.testing.assert_allclose(session.output, base.output, rtol=0, atol=tolerance)
            pairs = [(session.milliseconds(), base.milliseconds()) for _ in range(runs)]
            left = " ".join(f"{n} {op}" if n > 1 else op for op, n in session.operators.items())
            rows.setdefault((spelling.core, spelling.tail, left), []).append(
                (
                    spelling.opset,
                    statistics.median(mine for mine, _ in pairs),
                    statistics.median(mine / theirs for mine, theirs in pairs),
                )
            )
    for (core, tail, left), measured in rows.items():
        opsets, times, ratios = zip(*measured, strict=True)
        table.add_row(
            core,
            tail,
            " ".join(map(str, opsets)),
            left,
            f"{statistics.median(times):.2f}",
            f"{statistics.median(ratios):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
