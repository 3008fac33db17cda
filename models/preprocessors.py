"""Preprocessors, from which Optimum learns the sizes of the images that some families take."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

from transformers import (
    Pix2StructImageProcessor,
    Pix2StructProcessor,
    PretrainedConfig,
    PreTrainedModel,
    T5TokenizerFast,
    ViTImageProcessor,
)

from onnx_tricks.models.tokenizers import byte_tokenizer

__all__ = ["image_size", "preprocessors"]

_PATCHES = 12  # how many an image has at most, for Pix2Struct


@contextlib.contextmanager
def preprocessors(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Put preprocessors where Optimum looks for them: in a folder that the configuration names.

    Args:
        model: The model to export.

    Yields:
        Those that Optimum must be handed, and does not load.
    """
    name = model.config.name_or_path
    height, width = image_size(model.config)
    with tempfile.TemporaryDirectory() as folder:
        ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield _handed(model)
        finally:
            model.config.name_or_path = name


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width of the images for a model, or for the part of it that sees."""
    parts = (
        getattr(config, name, None) for name in ("backbone_config", "encoder", "vision_config")
    )
    size = getattr(next(filter(None, parts), config), "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _handed(model: PreTrainedModel) -> list[Any]:
    if model.config.model_type != "pix2struct":
        return []
    tokenizer = T5TokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    return [
        tokenizer,
        Pix2StructProcessor(Pix2StructImageProcessor(max_patches=_PATCHES), tokenizer),
    ]
