"""Write PyTorch models as ONNX in the spellings of the common exporters."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from onnx_tricks.models.dynamo import graphs
from onnx_tricks.models.experts import make_experts_dense
from onnx_tricks.models.preprocessors import preprocessors
from onnx_tricks.models.quiet import quietly

__all__ = ["DTYPES", "export_dynamo", "export_genai", "export_optimum"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The PyTorch types by their short names."""


def export_optimum(model: PreTrainedModel, out: Path, *, task: str, dtype: str = "fp32") -> None:
    """Exports with Optimum, which traces with TorchScript: what most ONNX files on hubs come from.

    Args:
        model: The model; it is converted to ``dtype`` in place.
        out: A new directory for the ``.onnx`` files and configurations, above 2 GB with
            external data.
        task: The task in Optimum's terms; with ``-with-past`` the key/value cache is exported.
        dtype: ``fp32`` or ``fp16``; ONNX Runtime, which Optimum needs on the way, lacks ``bf16``.
    """
    with quietly(), preprocessors(model) as handed:
        from optimum.exporters.onnx import onnx_export_from_model

        if dtype != "fp32":
            # The tracer writes fused attention with fp32 constants that widen half models.
            model.set_attn_implementation("eager")
        onnx_export_from_model(
            model.to(DTYPES[dtype]),
            out,
            task=task,
            do_validation=False,
            preprocessors=handed or None,
        )


def export_dynamo(
    model: PreTrainedModel, out: Path, *, opset: int, dtype: str = "fp32", cache: bool = False
) -> None:
    """Exports with ``torch.onnx.export(dynamo=True)``, batch and sequence dynamic.

    Args:
        model: The model; it is converted to ``dtype`` in place.
        out: A directory for ``model.onnx``, or ``encoder_model.onnx`` and ``decoder_model.onnx``
            of a model with two sides, and the configurations.
        opset: 18 decomposes norms and rotary embeddings; 23 has operators for them.
        dtype: A key of `DTYPES`.
        cache: Export a decoder with its key/value cache as inputs and outputs.
    """
    out.mkdir(parents=True, exist_ok=True)
    make_experts_dense(model)
    with quietly():
        for graph in graphs(model.to(DTYPES[dtype]), cache=cache):
            program = torch.onnx.export(
                graph.module,
                tuple(example for example, _ in graph.inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(graph.inputs),
                output_names=graph.outputs,
                dynamic_shapes=(tuple(axes for _, axes in graph.inputs.values()),),  # of *args
            )
            assert program is not None
            program.save(out / f"{graph.name}.onnx")
    model.config.save_pretrained(out)


def export_genai(source: Path, out: Path, *, dtype: str = "fp32") -> None:
    """Builds a model for onnxruntime-genai: fused norms, packed projections, fused attention.

    Args:
        source: A directory with a saved PyTorch model and its tokenizer.
        out: A new directory for ``model.onnx``, its data, ``genai_config.json`` and the tokenizer.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
    """
    with quietly(), tempfile.TemporaryDirectory() as cache:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        arguments = ("", str(source), str(out), dtype, "cpu", cache)
        create_model(*arguments, **parse_extra_options(*arguments, []))
