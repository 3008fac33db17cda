"""From a checkpoint to an optimised ONNX folder in one go."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from onnx_tricks.errors import ModelError, ParityError, UsageError
from onnx_tricks.optimizer import Optimized, Progress, optimize, select_passes
from onnx_tricks.rewrite import Pass
from onnx_tricks.runtime.sessions import load_runtime

__all__ = ["Dtype", "export"]

Dtype = Literal["fp32", "fp16", "bf16"]
_TASKS = {
    "input_features": "automatic-speech-recognition-with-past",
    "input_ids": "text2text-generation-with-past",
}
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(
    model: str | os.PathLike[str] | Any,
    output: str | os.PathLike[str],
    *,
    task: str = "auto",
    dtype: Dtype | None = None,
    passes: Sequence[str | Pass] | None = None,
    enable: Sequence[str | Pass] = (),
    skip: Sequence[str] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> Optimized:
    """Export a model of Transformers with Optimum, and optimise what comes out.

    The plain export lies beside the output until the result is written, and takes as much disk;
    the model is let go of before the optimiser starts.

    Args:
        model: A folder with a checkpoint, or a `transformers.PreTrainedModel`, which Optimum
            changes for the export.
        output: The folder of the result: ONNX files, configurations, and the tokenizer or
            processor of the checkpoint.
        task: What to export the model for, as Optimum names it; "auto" follows the model's class,
            with caches where it can have them.
        dtype: The type of the weights, into which a model in memory is converted in place; None
            for fp32, or for the type that a model in memory has.
        passes: As for `optimize`.
        enable: As for `optimize`.
        skip: As for `optimize`.
        verify: As for `optimize`; the proof compares with the plain export.
        progress: Told what the run is doing.

    Returns:
        The optimised models and the report.

    Raises:
        ModelError: There is no checkpoint, or Optimum cannot export it.
        ParityError: Verification failed; nothing was written.
        UsageError: Optimum is not installed, an argument is wrong, or the output cannot be written.
    """
    select_passes(passes, enable, skip)
    if dtype is not None and dtype not in _TYPES:
        raise UsageError(f"there is no type {dtype!r}; there are: {', '.join(_TYPES)}")
    on_disk = isinstance(model, (str, os.PathLike))
    given = os.fspath(model) if on_disk else type(model).__name__
    if on_disk and not Path(given, "config.json").is_file():
        raise ModelError(f"{given}: there is no such folder, or no config.json in it")
    if verify:
        load_runtime()
    _require_optimum()
    told = progress or (lambda _: None)
    with _folder_beside(Path(output)) as folder:
        told("exporting")
        with _exporting(given):
            _export(model, folder, task, dtype)
        # What Optimum built refers to itself, and would stay in memory beside the optimiser.
        gc.collect()
        try:
            done = optimize(
                folder,
                output,
                passes=passes,
                enable=enable,
                skip=skip,
                verify=verify,
                progress=progress,
            )
        except ParityError as error:
            if error.report is not None:
                error.report = dataclasses.replace(error.report, input=given)
            raise
    return done._replace(report=dataclasses.replace(done.report, input=given))


def _require_optimum() -> None:
    try:
        import optimum.exporters.onnx  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Exporting needs Optimum and PyTorch, which are not installed: "
            "pip install onnx-tricks[cpu,optimum] (or onnx-tricks[gpu,optimum])"
        ) from error


def _export(model: Any, folder: Path, task: str, dtype: Dtype | None) -> None:
    """Write the plain export; the last reference to a model read from disk ends here."""
    import torch
    from optimum.exporters.onnx import onnx_export_from_model

    if isinstance(model, (str, os.PathLike)):
        model = _read(Path(model), dtype or "fp32")
    elif dtype is not None:
        model = model.to(getattr(torch, _TYPES[dtype]))
    if model.dtype != torch.float32:
        # The tracer writes fused attention with fp32 constants that widen half models.
        model.set_attn_implementation("eager")
    chosen = _task(model) if task == "auto" else task
    onnx_export_from_model(model.eval(), folder, task=chosen, do_validation=False)


def _task(model: Any) -> str | None:
    """The task of a model that generates; None leaves the choice to Optimum.

    Optimum takes the first task that lists a class, which for BART is to fill in masks.
    """
    if not model.can_generate():
        return None
    if not model.config.is_encoder_decoder:
        return "text-generation-with-past"
    return _TASKS.get(model.main_input_name)


def _read(folder: Path, dtype: Dtype) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or ["none at all"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ModelError(f"{folder}: Transformers has no class {names[0]}, which config.json names")
    return model_class.from_pretrained(folder, dtype=_TYPES[dtype], local_files_only=True)


@contextlib.contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A folder for a while, on the disk of the output."""
    place = next(p for p in output.absolute().parents if p.is_dir())
    try:
        folder = tempfile.TemporaryDirectory(prefix=".onnx-tricks-export-", dir=place)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error}") from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _exporting(given: str) -> Iterator[None]:
    """Keep the libraries quiet, and tell which model it was that they could not export."""
    from onnx_tricks.models.quiet import quietly

    try:
        with quietly():
            yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{given}: the model cannot be exported: {lines[0]}") from error
