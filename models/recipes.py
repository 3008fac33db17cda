"""Reference models by name: built, exported once, kept in a cache that processes share."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from onnx_tricks.errors import UsageError
from onnx_tricks.models import dynamo, experts, export, families, fused, trained
from onnx_tricks.models.quiet import quietly
from onnx_tricks.models.tokenizers import byte_tokenizer

__all__ = ["EXPORTERS", "RECIPES", "Recipe", "exported"]

_CAUSAL = "text-generation-with-past"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to get a PyTorch model.

    Attributes:
        source: What the model is made from; when its text changes, exports are made anew.
        build: Returns the model in fp32 and evaluation mode.
        task: The task under which Optimum exports it.
        tokenizer: Returns the tokenizer, if the model has one.
    """

    source: str
    build: Callable[[], PreTrainedModel]
    task: str
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None


_TRAINED, _FAMILIES = inspect.getsource(trained), inspect.getsource(families)
RECIPES = {
    "smollm2-2": Recipe(_TRAINED, partial(trained.smollm2, 2), _CAUSAL, trained.smollm2_tokenizer),
    "smollm2-4": Recipe(_TRAINED, partial(trained.smollm2, 4), _CAUSAL, trained.smollm2_tokenizer),
    "smollm2-30": Recipe(_TRAINED, trained.smollm2, _CAUSAL, trained.smollm2_tokenizer),
    "tiny-llama": Recipe(_TRAINED, trained.tiny_llama, _CAUSAL),
    "mgm": Recipe(_TRAINED, trained.mgm, _CAUSAL),
    "whisper-tiny.en": Recipe(
        _TRAINED, trained.whisper_tiny_en, "automatic-speech-recognition-with-past"
    ),
    "llama-2gb": Recipe(_FAMILIES, families.llama_2gb, _CAUSAL),
    **{
        name: Recipe(f"{_FAMILIES}{family}", partial(families.tiny, name), family.task)
        for name, family in families.FAMILIES.items()
    },
}
"""Trained weights, the large benchmark model, and one tiny random model for each family."""

EXPORTERS = (
    "pytorch",
    "optimum",
    "dynamo18",
    "dynamo23",
    "dynamo18-cache",
    "dynamo23-cache",
    "genai",
    "ort",
)
"""What writes a model: ``pytorch`` saves it as it is, the others write ONNX.

A number is the opset; ``-cache`` adds the key/value cache of a decoder. ``ort`` is Optimum's export
after ONNX Runtime's transformers optimizer.
"""

_TOOLS = ("torch", "transformers", "optimum-onnx", "onnx", "onnxscript", "onnxruntime-genai")


def exported(recipe: str, exporter: str = "optimum", dtype: str = "fp32") -> Path:
    """The directory of an export, made on the first call and cached after it.

    The cache is ``$ONNX_TRICKS_CACHE``, else ``.cache`` in the working directory. An export is
    made again when one of the tools or the source of the recipe changes. Processes may call this
    at the same time; one exports and the others wait.

    Args:
        recipe: A key of `RECIPES`.
        exporter: One of `EXPORTERS`.
        dtype: ``fp32``, ``fp16`` or ``bf16``.

    Returns:
        A directory that must not be written to.

    Raises:
        UsageError: An argument is unknown, trained weights are not installed, or the builder of
            onnxruntime-genai does not know the model.
    """
    for value, known in ((recipe, RECIPES), (exporter, EXPORTERS), (dtype, export.DTYPES)):
        if value not in known:
            raise UsageError(f"Unknown {value!r}. Choose one of: {', '.join(known)}.")
    cache = Path(os.environ.get("ONNX_TRICKS_CACHE", ".cache")).absolute()
    out = cache / f"{recipe}-{exporter}-{dtype}-{_key(RECIPES[recipe], exporter)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.exists():
            # The rename comes last, so that an interrupted export is never taken for a whole one.
            unfinished = out.with_name(f"{out.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            with quietly():
                _export(recipe, exporter, dtype, unfinished)
            unfinished.rename(out)
    return out


def _export(name: str, exporter: str, dtype: str, out: Path) -> None:
    recipe = RECIPES[name]
    if exporter == "pytorch":
        recipe.build().to(export.DTYPES[dtype]).save_pretrained(out)
        if recipe.tokenizer:
            recipe.tokenizer().save_pretrained(out)
        return
    if exporter == "ort":
        fused.export_fused(exported(name, "optimum", dtype), out)
        return
    if exporter == "genai":
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(exported(name, "pytorch"), folder, dirs_exist_ok=True)
            if recipe.tokenizer is None:
                byte_tokenizer().save_pretrained(folder)
            try:
                export.export_genai(Path(folder), out, dtype=dtype)
            except NotImplementedError as error:
                raise UsageError(
                    f"The builder of onnxruntime-genai does not know models like {name}."
                ) from error
        return
    if recipe.tokenizer is None:
        model = recipe.build()
    else:  # the packages that bring a tokenizer take half a minute to read, so read them once
        source = exported(name, "pytorch")
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(source)
    if exporter == "optimum":
        export.export_optimum(model, out, task=recipe.task, dtype=dtype)
    else:
        opset, _, cache = exporter.removeprefix("dynamo").partition("-")
        export.export_dynamo(model, out, opset=int(opset), dtype=dtype, cache=bool(cache))


def _key(recipe: Recipe, exporter: str) -> str:
    versions = [f"{tool}=={importlib.metadata.version(tool)}" for tool in _TOOLS]
    modules = (export, dynamo, experts) if exporter.startswith("dynamo") else (export,)
    sources = [recipe.source, *(inspect.getsource(module) for module in modules)]
    return hashlib.sha256("\n".join(versions + sources).encode()).hexdigest()[:12]
