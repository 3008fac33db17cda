"""Export plain PyTorch models of token ids, as those are that no library knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from onnx_tricks.errors import UsageError
from onnx_tricks.models.quiet import quietly

__all__ = ["EXPORTERS", "write"]

EXPORTERS = ("dynamo18", "dynamo23", "torchscript")
"""What `write` knows: torch dynamo by opset, and the tracer at opset 17."""

_BATCH, _LENGTH = 2, 7  # of the example; both are dynamic in the export


def write(
    model: nn.Module, path: Path, exporter: str, past: Mapping[str, Tensor] | None = None
) -> None:
    """Export a model, with batch and sequence dynamic.

    Args:
        model: Takes int64 [B, T] and returns logits [B, T, V]. With a past it takes an attention
            mask [B, P + T] too, and what `past` names, and returns the same with T tokens more.
        path: The .onnx file.
        exporter: One of `EXPORTERS`.
        past: By name examples [2, G, P, K] of cached keys and values, such as
            ``past_key_values.0.key``; they leave as ``present.0.key``.

    Raises:
        UsageError: There is no such exporter.
    """
    if exporter not in EXPORTERS:
        raise UsageError(f"Unknown {exporter!r}. Choose one of: {', '.join(EXPORTERS)}.")
    examples = {"input_ids": torch.ones(_BATCH, _LENGTH, dtype=torch.long)}
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    for name, example in (past or {}).items():
        total = example.shape[2] + _LENGTH
        examples.setdefault("attention_mask", torch.ones(_BATCH, total, dtype=torch.long))
        axes.setdefault("attention_mask", {0: "batch", 1: "total"})
        examples[name], axes[name] = example, {0: "batch", 2: "past"}
    outputs = ["logits", *(one.replace("past_key_values", "present") for one in past or ())]
    names = {"input_names": list(examples), "output_names": outputs}
    with quietly():
        if exporter == "torchscript":
            present: dict[str, dict[int, str]] = {
                name: {0: "batch", 2: "total"} for name in outputs[1:]
            }
            torch.onnx.export(
                model.eval(),
                tuple(examples.values()),
                path,
                dynamo=False,
                opset_version=17,
                dynamic_axes={**axes, **present},
                **names,
            )
            return
        first, *rest = [_dynamic(one) for one in axes.values()]
        program = torch.onnx.export(
            model.eval(),
            tuple(examples.values()),
            dynamo=True,
            opset_version=int(exporter.removeprefix("dynamo")),
            dynamic_shapes=(first, tuple(rest)) if rest else (first,),  # further ones are *args
            **names,
        )
        assert program is not None
        program.save(path)


def _dynamic(axes: Mapping[int, str]) -> dict[int, Any]:
    """Axes that carry one Dim are tied; the total of past and new tokens is worked out."""
    return {place: name if name == "total" else Dim(name) for place, name in axes.items()}
