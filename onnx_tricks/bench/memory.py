"""Peak memory of a process that does one workload and nothing else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from onnx_tricks.bench.files import find_files
from onnx_tricks.bench.subject import open_subject
from onnx_tricks.bench.workload import Settings, Workload

__all__ = ["main", "measure_peak"]

_STATUS = Path("/proc/self/status")
_CODE = "from onnx_tricks.bench.memory import main; main()"
_RUNS = 3  # outputs of one run are there while the next makes its own


def measure_peak(source: Path, work: Workload, settings: Settings) -> int | None:
    """Run a workload in a process of its own.

    Returns:
        The most memory that was resident, in bytes; None where that cannot be told: on systems
        other than Linux, or where the process fails.
    """
    if not _STATUS.is_file():
        return None
    task = json.dumps([str(source), dataclasses.asdict(work), dataclasses.asdict(settings)])
    done = subprocess.run(  # noqa: S603 - this interpreter, with its own code
        [sys.executable, "-c", _CODE, task], capture_output=True, text=True, check=False
    )
    return int(done.stdout) if done.returncode == 0 else None


def main() -> None:
    """Do what the arguments of the process say, and print the peak."""
    source, work, settings = json.loads(sys.argv[1])
    subject = open_subject(find_files(Path(source)), Settings(**settings), by_chance=True)
    run = subject.prepare(Workload(**work))
    for _ in range(_RUNS):
        run()
    # Not `ru_maxrss`, which a child begins with its parent's.
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    sys.stdout.write(f"{int(peak) * 1024}\n")
