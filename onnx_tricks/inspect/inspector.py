"""Is it worth it for my model? Every trick tried or estimated, nothing written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.plan import find_models
from onnx_tricks.inspect.estimates import combine, estimate_tricks
from onnx_tricks.inspect.from_config import read_config
from onnx_tricks.inspect.inspection import Inspection
from onnx_tricks.inspect.trial import Trial
from onnx_tricks.models import demo_path
from onnx_tricks.passes import PASSES

__all__ = ["inspect"]

_CONTEXT = 2048
_CONFIGS = ("config.json", "genai_config.json")


def inspect(
    model: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1, 16, 256),
    context: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Tell what each trick would do to a model, and whether it is worth it.

    Passes are tried on the graphs as `optimize` with ``dry_run`` does it; for a config.json, and
    for tricks that have no pass, the figures follow from the dimensions.

    Args:
        model: A .onnx file, a folder of them, a Hugging Face config.json or a folder with nothing
            else, or "demo" for the model that comes with the package.
        batches: Numbers of sequences that are decoded together.
        context: Tokens of context; None for the longest that the model is made for, or 2048 where
            that is not known.
        progress: Told what is being done.

    Raises:
        ModelError: The input is not a model, or its config.json cannot be read.
        UsageError: A batch or the context is not positive.
    """
    if not batches or min(batches) < 1 or (context is not None and context < 1):
        raise UsageError("batches and context are positive whole numbers: --batch 1,16 --context 9")
    given = os.fspath(model)
    source = demo_path() if given == "demo" and not Path(given).exists() else Path(given)
    config = _find_config(source)
    if config is not None and (config == source or not _holds_models(source)):
        found = _from_config(given, config)
    else:
        found = _from_graphs(given, Trial(source, config, progress or (lambda _: None)))
    longest = found.dimensions.context if found.dimensions else None
    return dataclasses.replace(
        found, batches=tuple(dict.fromkeys(batches)), context=context or longest or _CONTEXT
    )


def _holds_models(source: Path) -> bool:
    try:
        return bool(find_models(source))
    except ModelError:
        return not source.is_dir()


def _find_config(source: Path) -> Path | None:
    """The config.json of a model: beside it, or beside the folder `onnx` that it lies in."""
    if source.suffix == ".json":
        return source
    folder = source if source.is_dir() else source.parent
    folders = (folder, folder.parent) if folder.name == "onnx" else (folder,)
    found = (one / name for one in folders for name in _CONFIGS if (one / name).is_file())
    return next(found, None)


def _from_config(given: str, config: Path) -> Inspection:
    dims = read_config(config)
    if dims.ffn is None:
        raise ModelError(f"{config}: does not tell the feed-forward blocks; give a config.json")
    traffic = dims.traffic
    tricks = tuple(estimate_tricks(dims, traffic))
    stored = dims.weights(dims.parameters)
    found = Inspection(given, "config", None, dims, stored, traffic, tricks, traffic)
    return dataclasses.replace(found, combined=combine(found, traffic))


def _from_graphs(given: str, trial: Trial) -> Inspection:
    tried = [trial.try_pass(one) for one in PASSES]
    names = {trick.name for trick in tried}
    tricks = (*tried, *estimate_tricks(trial.dimensions, trial.traffic, names))
    found = Inspection(
        given,
        "graph",
        trial.step.name,
        trial.dimensions,
        trial.stored,
        trial.traffic,
        tricks,
        trial.traffic,
        notes=tuple(trial.notes),
    )
    together = trial.try_together([trick for trick in tried if found.joins(trick)])
    return dataclasses.replace(found, combined=combine(found, together))
