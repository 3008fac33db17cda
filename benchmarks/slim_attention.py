"""Original decoders against slim ones in ONNX Runtime, both fully optimised, in pairs.

    python benchmarks/slim_attention.py [--batch 1,8] [--seconds 2] [--json FILE]

What `onnx-tricks bench` prints for the demo model (whose slim caches hold keys and a residual) and
for Whisper tiny.en (inputs of the layers, and the encoder's output), beside their slim forms.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onnx_tricks.bench import compare, print_comparison, to_dict
from onnx_tricks.models import demo_path
from onnx_tricks.models.recipes import exported
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import FoldNorm, SlimAttention

__all__ = ["main"]

# Whisper writes 448 tokens at most.
_LENGTHS = {
    "demo": {"cached": (128, 1024, 4096), "prompt": (512,)},
    "whisper-tiny.en": {"cached": (128, 416), "prompt": (4,)},
}


def main(
    batch: Annotated[str, typer.Option(help="Rows that run together.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="Time for each workload.")] = 2.0,
    threads: Annotated[int, typer.Option(help="0: ONNX Runtime chooses.")] = 0,
    report: Annotated[Path | None, typer.Option("--json", help="Write JSON to this file.")] = None,
) -> None:
    """Print a table for each model."""
    console, found = Console(width=100), {}
    for name, lengths in _LENGTHS.items():
        source = demo_path() if name == "demo" else exported(name)
        with tempfile.TemporaryDirectory() as folder:
            slim = Path(folder, name)
            optimize(source, slim, passes=[FoldNorm(), SlimAttention()], verify=False)
            comparison = compare(
                source,
                slim,
                batch=[int(rows) for rows in batch.split(",")],
                **lengths,
                seconds=seconds,
                threads=threads,
                progress=lambda text: print(text, file=sys.stderr),
            )
        print_comparison(comparison, console)
        found[name] = to_dict(comparison)
    if report is not None:
        report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
