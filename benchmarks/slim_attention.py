"""Original decoders against slim ones in ONNX Runtime, both fully optimised, in pairs.

    python benchmarks/slim_attention.py [--rounds 7] [--quick]

Times one step over caches of several lengths, and a prompt, for the demo model (keys and a
residual) and Whisper tiny.en (layer inputs and encoder states, by model-local functions in plain
ONNX). A ratio above one says that the slim model is faster. Bytes are what the caches of one batch
hold; peak memory is that of a process that opens the model and runs the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.models import demo_path
from onnx_tricks.models.recipes import exported
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import FoldNorm, SlimAttention

_ENCODER = 1500
_TYPES = {1: np.float32, 7: np.int64, 9: np.bool_, 10: np.float16}


@dataclasses.dataclass(frozen=True)
class Work:
    """One step: so many rows, new tokens and cached tokens."""

    batch: int
    new: int
    past: int


class Stepper:
    """A decoder with everything bound, so that only its own time counts."""

    def __init__(self, path: Path, work: Work) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        interface = read_interface(load_model(path).model)
        self.binding = self.session.io_binding()
        self.cache_bytes = 0
        for name, array in _feeds(interface, work).items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(name, value)
            if name.startswith("past_key_values"):
                self.cache_bytes += array.nbytes
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name)

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def _feeds(interface: Interface, work: Work) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    feeds = {}
    for value in interface.inputs:
        dtype = _TYPES[int(value.dtype)]
        dims: list[int] = []
        for axis, dim in enumerate(value.dims):
            cached = _ENCODER if "encoder" in value.name else work.past
            dims.append(work.batch if axis == 0 else dim if isinstance(dim, int) else cached)
        if value.role == "ids":
            array = random.integers(1, 200, (work.batch, work.new))
        elif value.role == "mask":
            array = np.ones((work.batch, work.past + work.new))
        elif value.role == "positions":
            array = np.tile(np.arange(work.past, work.past + work.new), (work.batch, 1))
        elif value.role == "branch":
            array = np.array([work.past > 0])
        else:
            array = random.standard_normal(dims)
        feeds[value.name] = array.astype(dtype)
    return feeds


def _peak(path: Path, work: Work) -> int:
    """Peak memory of a process that runs one step, in bytes; on Linux only."""
    code = (
        "import sys; from pathlib import Path; import slim_attention as b;"
        f"b.Stepper(Path({str(path)!r}), b.Work({work.batch}, {work.new}, {work.past})).run();"
        # Not ru_maxrss, which a child begins with its parent's.
        "lines = Path('/proc/self/status').read_text().splitlines();"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024


def compare(name: str, original: Path, slim: Path, works: list[Work], rounds: int) -> Table:
    """One row for each kind of step."""
    table = Table(
        *("batch", "new", "cached", "original ms", "slim ms", "ratio (range)"),
        *("cache MB", "slim MB", "peak MB", "slim MB "),
        title=name,
    )
    for work in works:
        both = Stepper(original, work), Stepper(slim, work)
        for one in both:
            one.run()
        pairs = [(both[0].run(), both[1].run()) for _ in range(rounds)]
        ratios = sorted(a / b for a, b in pairs)
        times = [statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)]
        peaks = [_peak(path, work) / 1e6 for path in (original, slim)]
        table.add_row(
            *(str(n) for n in (work.batch, work.new, work.past)),
            *(f"{one:.2f}" for one in times),
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            *(f"{one.cache_bytes / 1e6:.2f}" for one in both),
            *(f"{one:.0f}" for one in peaks),
        )
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small batches only")
    arguments = parser.parse_args()
    batches = (1, 8) if arguments.quick else (1, 8, 32)
    console = Console(width=120)
    make: Callable[[Path, Path], object] = lambda source, out: optimize(  # noqa: E731
        source, out, passes=[FoldNorm(), SlimAttention()], verify=False
    )
    with tempfile.TemporaryDirectory() as folder:
        demo = demo_path() / "model.onnx"
        make(demo, Path(folder, "demo.onnx"))
        works = [Work(b, 1, past) for past in (128, 1024, 4096) for b in batches]
        works += [Work(b, 512, 0) for b in batches]
        rounds = arguments.rounds
        console.print(compare("demo model", demo, Path(folder, "demo.onnx"), works, rounds))
        whisper = exported("whisper-tiny.en")
        make(whisper, Path(folder, "whisper"))
        works = [Work(b, 1, past) for past in (128, 440) for b in batches]
        works += [Work(b, 4, 0) for b in batches]
        merged, slim = whisper / "decoder_model_merged.onnx", Path(folder, "whisper")
        slim /= "decoder_model.onnx"
        console.print(compare("Whisper tiny.en", merged, slim, works, rounds))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    console.print(f"ONNX Runtime {onnxruntime.__version__}, {kilobytes / 1e6:.1f} GB at most here")


if __name__ == "__main__":
    main()
