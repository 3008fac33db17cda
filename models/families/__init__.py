"""Models with random weights: a tiny one for each family that Transformers knows, and a large one.

Every norm gain and every bias is random, so that losing one changes the output.
"""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from onnx_tricks.errors import UsageError
from onnx_tricks.models.families.audio import AUDIO
from onnx_tricks.models.families.decoders import DECODERS
from onnx_tricks.models.families.encoders import ENCODERS
from onnx_tricks.models.families.family import Family
from onnx_tricks.models.families.multimodal import MULTIMODAL
from onnx_tricks.models.families.seq2seq import SEQ2SEQ
from onnx_tricks.models.families.vision import VISION

__all__ = ["FAMILIES", "Family", "llama_2gb", "tiny"]

FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, **SEQ2SEQ, **VISION, **AUDIO, **MULTIMODAL}
"""The families by their model type in Transformers; a suffix tells a variant."""


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """Builds the tiny model of a family.

    Args:
        name: A key of `FAMILIES`.
        seed: Another seed gives other weights.

    Returns:
        The fp32 model in evaluation mode.

    Raises:
        UsageError: There is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"There is no family {name!r}. Choose one of: {', '.join(FAMILIES)}.")
    row = FAMILIES[name]
    kind = getattr(transformers, row.model)
    config = getattr(transformers, row.config) if row.config else kind.config_class
    sizes = copy.deepcopy(row.sizes)  # some configurations empty what they are given
    # Values that PyTorch would set are set below, and some models fail to set their own; buffers
    # may be random, too.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        torch.manual_seed(seed)
        model = kind(config(**sizes))
    model.tie_weights()
    _randomise(model, seed)
    return model.eval()


def llama_2gb() -> LlamaForCausalLM:
    """A Llama of 2.2 GB for benchmarks of memory and time: D 1536, F 4096, 16 layers, fp32."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=24,
    )
    model = LlamaForCausalLM(config)
    _randomise(model, seed=0)
    return model.eval()


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Fills all parameters: gains in [0.5, 1.5], biases of size 0.2, matrices that keep size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied ones come once
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
