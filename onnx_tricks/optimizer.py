"""The call that optimises a model: which passes, what goes in, where the result goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_tricks.errors import UsageError
from onnx_tricks.models import demo_path
from onnx_tricks.passes import PASSES
from onnx_tricks.rewrite import Pass
from onnx_tricks.run import Model, Optimized, Progress, Run
from onnx_tricks.runtime.sessions import load_runtime
from onnx_tricks.verify import Inputs, read_samples

__all__ = ["Optimized", "Progress", "optimize", "select_passes"]


def optimize(
    model: str | os.PathLike[str] | Model,
    output: str | os.PathLike[str] | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    enable: Sequence[str | Pass] = (),
    skip: Sequence[str] = (),
    verify: bool = True,
    inputs: Inputs | Sequence[Inputs] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Optimized:
    """Optimise a model: the same function from fewer numbers.

    Args:
        model: A .onnx file, a folder of them as Optimum and the genai builder write it, "demo" for
            the model that comes with the package, or a model in memory (which is not changed).
        output: Where the result goes: a file or a folder, like the input; it may be the input. None
            writes nothing.
        passes: Exactly these passes, by name or as objects with options; None for the default set.
        enable: Passes added to the default set.
        skip: Names of passes to leave out.
        verify: Prove that the result computes what the input computes, before it is written.
        inputs: Inputs of your own that the proof runs too, as `onnx_tricks.verify` takes them.
        dry_run: Report what would be done; write and verify nothing.
        progress: Told what the run is doing.

    Returns:
        The optimised model and the report.

    Raises:
        ModelError: The input is not a model, is broken, or its weights are missing.
        UsageError: Unknown passes, an output that cannot be written, or inputs that do not fit.
        ParityError: Verification failed; nothing was written. `ParityError.report` tells more.
    """
    chosen = select_passes(passes, enable, skip)
    samples = read_samples(inputs)
    if samples and not verify:
        raise UsageError("inputs are for the proof, which is not asked for: leave out one of both")
    if verify and not dry_run:
        load_runtime()
    told = progress or (lambda _: None)
    if isinstance(model, (ir.Model, onnx.ModelProto)):
        run = Run("", chosen, verify and not dry_run, told, samples)
        return run.in_memory(model, None if dry_run else output)
    given = os.fspath(model)
    run = Run(given, chosen, verify and not dry_run, told, samples)
    source = Path(given)
    if given == "demo" and not source.exists():
        source = demo_path()
    return run.from_files(source, None if dry_run else output)


def select_passes(
    passes: Sequence[str | Pass] | None,
    enable: Sequence[str | Pass] = (),
    skip: Sequence[str] = (),
) -> tuple[Pass, ...]:
    """The passes of a run, in the order of the registry.

    Raises:
        UsageError: A name is not that of a pass.
    """
    known = {one.name: one for one in PASSES}
    asked = [one for one in (*(passes or ()), *enable, *skip) if isinstance(one, str)]
    for name in asked:
        if name not in known:
            raise UsageError(f"there is no pass {name!r}; there are: {', '.join(known)}")
    start = [name for name, one in known.items() if one.default] if passes is None else passes
    wanted = {one if isinstance(one, str) else one.name: one for one in (*start, *enable)}
    order = [name for name in known if name in wanted and name not in skip]
    order += [name for name in wanted if name not in known and name not in skip]
    return tuple(
        known[name]() if isinstance(wanted[name], str) else wanted[name]  # type: ignore[misc]
        for name in order
    )
