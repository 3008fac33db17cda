"""What looking up the first layer saves in decoding, and what memory its table takes to build.

Two questions, each with a command: `decode` compares an original with its optimised form in ONNX
Runtime, token by token and in turn, so that a slow minute of the machine hits both; `memory` runs
`onnx-tricks optimize` on a decoder of a large vocabulary in a process of its own.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import typer
from rich.console import Console
from rich.table import Table

import onnx_tricks
from onnx_tricks import PrecomputeFirstLayer
from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.passes.precompute_first_layer import FirstLayer

__all__ = ["Pair", "main"]

_MODELS = ("smollm2-2", "smollm2-4", "smollm2-30", "gpt-neox")
_PAST = 64  # tokens in the cache while a token is decoded
_WARM = 5
_GB = 1e9
_MOST_BYTES = 1.0 * _GB
_COMMAND = "from onnx_tricks.cli import main; main()"

# Of `memory`: vocabulary and width.
_V, _D = 128_000, 2048
_ROWS = 256  # that are written at once
_SHAPES = {"table": (_V, _D), **dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (_D, _D))}
_DECODER = """
<ir_version: 10, opset_import: ["" : 18]>
decoder (int64[B, S] ids) => (float[B, S, D] y) {
    x = Gather(table, ids)
    n = SimplifiedLayerNormalization(x, g)
    q = MatMul(n, w_q)
    k = MatMul(n, w_k)
    v = MatMul(n, w_v)
    turned = Transpose<perm = [0, 2, 1]>(k)
    score = MatMul(q, turned)
    p = Softmax(score)
    a = MatMul(p, v)
    o = MatMul(a, w_o)
    y = Add(x, o)
}
"""

main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Times of one model and its optimised form.

    Attributes:
        name: The model.
        original: Milliseconds for a token, run after run.
        optimised: Likewise, each run beside one of the original.
        bytes_before: Bytes of weights read for one token.
        bytes_after: Likewise, of the optimised model.
    """

    name: str
    original: list[float]
    optimised: list[float]
    bytes_before: int
    bytes_after: int

    @property
    def saved(self) -> list[float]:
        """Parts of the time that each optimised run saves."""
        pairs = zip(self.original, self.optimised, strict=True)
        return [1 - after / before for before, after in pairs]

    @property
    def expected(self) -> float:
        """The part of the bytes that is no longer read."""
        return 1 - self.bytes_after / self.bytes_before


@main.command()
def decode(
    models: Annotated[str, typer.Option(help="Which, comma-separated.")] = ",".join(_MODELS),
    blocks: Annotated[int, typer.Option(help="Blocks of pairs, each with new sessions.")] = 8,
    pairs: Annotated[int, typer.Option(help="Pairs in a block.")] = 40,
) -> None:
    """Time decoding, in pairs."""
    console = Console(width=120)
    console.print(
        f"{_heading()}, ONNX Runtime {onnxruntime.__version__}, one thread, its CPU time\n"
        f"one token after {_PAST}, float32; {blocks} x {pairs} pairs: median (quartiles)",
        highlight=False,
    )
    table = Table()
    for name in (
        "model",
        "original ms",
        "optimised ms",
        "time saved",
        "MB read",
        "then",
        "not read",
    ):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name in models.split(","):
        print(f"timing {name}", file=sys.stderr)
        pair = _time(name, blocks, pairs)
        table.add_row(
            pair.name,
            _spread(pair.original, 2),
            _spread(pair.optimised, 2),
            _spread([100 * one for one in pair.saved], 1) + " %",
            f"{pair.bytes_before / 1e6:.1f}",
            f"{pair.bytes_after / 1e6:.1f}",
            f"{100 * pair.expected:.1f} %",
        )
    console.print(table)


@main.command()
def memory(
    check: Annotated[bool, typer.Option(help="Fail above 1 GB beside the first layer.")] = False,
) -> None:
    """Measure the peak memory of building a large table."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "out" / "model.onnx"
        layer_bytes = _write_decoder(source)
        options = (
            "--passes",
            "precompute-first-layer",
            "--max-growth",
            "1000",
            "--no-verify",
            "-q",
        )
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, "optimize", source, target, *options]
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise typer.Exit(1)
        written = sum(path.stat().st_size for path in target.parent.iterdir())
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(
        f"{_heading()}\n"
        f"V {_V:,}, D {_D}, float32: {written / _GB:.2f} GB written in {seconds:.0f} s, "
        f"peak memory {peak / _GB:.2f} GB; the first layer has {layer_bytes / _GB:.2f} GB",
        highlight=False,
    )
    if check:
        broken = peak - layer_bytes > _MOST_BYTES
        console.print("above 1 GB beside the first layer" if broken else "bound kept")
        raise typer.Exit(1 if broken else 0)


def _time(name: str, blocks: int, pairs: int) -> Pair:
    source = _export(name)
    times: dict[Path, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        first = PrecomputeFirstLayer(max_growth=1e4)
        onnx_tricks.optimize(source, target, passes=[first], verify=False)
        model = load_model(source).model
        annotate(model)
        (site,) = (one for one in first.sites(model) if isinstance(one, FirstLayer))
        feeds = _feeds(read_interface(model))
        for block in range(blocks):
            # Where a session's weights come to lie counts, and so may who goes first.
            order = (source, target) if block % 2 else (target, source)
            sessions = {path: _session(path) for path in order}
            for _ in range(_WARM):
                for session in sessions.values():
                    session.run(None, feeds)
            for _ in range(pairs):
                for path, session in sessions.items():
                    start = time.thread_time()
                    session.run(None, feeds)
                    times.setdefault(path, []).append(1000 * (time.thread_time() - start))
            del sessions, session
    growth = site.growth
    embedding = site.region.vocabulary * (growth.reads_before - site.cut.weights)
    tied = growth.removed - site.cut.weights < embedding // 2
    # All weights are read for a token, but of a table only what is looked up in it.
    before = growth.before - (0 if tied else embedding)
    after = before - growth.reads_before + growth.reads_after
    return Pair(name, times[source], times[target], before, after)


def _export(name: str) -> Path:
    """The model, exported by Optimum on the first call."""
    if name != "gpt-neox":
        from onnx_tricks.models.recipes import exported

        return exported(name, "optimum") / "model.onnx"
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from onnx_tricks.models.export import export_optimum

    folder = Path(os.environ.get("ONNX_TRICKS_CACHE", ".cache")) / "gpt-neox-1024-4"
    if not (folder / "model.onnx").exists():
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=4,
            num_attention_heads=16,
        )
        model = GPTNeoXForCausalLM(config).eval()
        export_optimum(model, folder, task="text-generation-with-past")
    return folder / "model.onnx"


def _session(path: Path) -> onnxruntime.InferenceSession:
    """As users run models: fully optimised by the runtime itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(interface: Interface) -> Mapping[str, np.ndarray]:
    """One new token behind a filled cache."""
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in interface.inputs:
        if value.role == "cache":
            heads, width = value.dims[1], value.dims[3]
            feeds[value.name] = random.standard_normal((1, heads, _PAST, width)).astype(np.float32)
        elif value.role == "mask":
            feeds[value.name] = np.ones((1, _PAST + 1), np.int64)
        elif value.role == "positions":
            feeds[value.name] = np.full((1, 1), _PAST)
        else:
            feeds[value.name] = random.integers(0, value.limit, (1, 1))
    return feeds


def _write_decoder(path: Path) -> int:
    """Write a decoder of one layer, row by row; return the bytes that its table does away with."""
    proto = onnx.parser.parse_model(_DECODER)
    random = np.random.default_rng(0)
    with path.with_suffix(".data").open("wb") as file:
        for name, (rows, columns) in _SHAPES.items():
            offset = file.tell()
            for _ in range(0, rows, _ROWS):
                block = random.standard_normal((_ROWS, columns), np.float32) / np.sqrt(rows)
                file.write(block.astype(np.float32).tobytes())
            nbytes = file.tell() - offset
            dtype, shape = ir.DataType.FLOAT, ir.Shape([rows, columns])
            tensor = ir.ExternalTensor("model.data", offset, nbytes, dtype, shape=shape, name=name)
            proto.graph.initializer.append(ir.to_proto(tensor))
    gain = onnx.numpy_helper.from_array(np.ones(_D, np.float32), "g")
    proto.graph.initializer.append(gain)
    onnx.save(proto, path)
    return 3 * 4 * _D * _D


def _heading() -> str:
    machine = platform.machine().replace("_", "-")
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{dt.datetime.now(dt.UTC).date()}, {os.cpu_count()} cores {machine}, {gigabytes:.0f} GB"


def _spread(numbers: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
