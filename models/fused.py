"""Graphs as ONNX Runtime's transformers optimizer leaves them: its own fused operators."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoConfig

from onnx_tricks.models.quiet import quietly

__all__ = ["export_fused"]

# The optimizer knows architectures by the name of one; those it was not told of are like BERT.
_LIKE = {"gpt2": "gpt2", "t5": "t5", "vit": "vit"}
_LIKE |= dict.fromkeys(("bart", "marian", "m2m_100", "mbart", "pegasus", "whisper"), "bart")


def export_fused(source: Path, out: Path) -> None:
    """Run the optimizer on every graph of an export, but for a merged decoder's branches.

    Args:
        source: A directory with .onnx files and a config.json.
        out: An existing directory for the results.
    """
    with quietly():
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        config = AutoConfig.from_pretrained(source)
        kind = _LIKE.get(config.model_type, "bert")
        options = FusionOptions(kind)
        options.use_multi_head_attention = True
        for path in source.iterdir():
            if path.suffix == ".onnx" and "merged" not in path.name:
                done = optimize_model(
                    str(path),
                    model_type=kind,
                    num_heads=config.num_attention_heads,
                    hidden_size=config.hidden_size,
                    optimization_options=options,
                )
                done.save_model_to_file(str(out / path.name))
            elif path.suffix != ".onnx":
                shutil.copy(path, out)
