"""What a row of the tables of families says, and the sizes that rows share.

The tiny sizes are odd and all different, so that a mistaken axis shows as a shape error: width 48
in 4 heads, 80 inside the feed-forward block, 97 tokens, 64 positions, 2 layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["BOTH_SIDES", "CAUSAL", "EXPERTS", "GPT", "GROUPED", "SIZES", "WIDE", "Family"]

CAUSAL = "text-generation-with-past"

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 14}  # heads that do not add up to the width
GPT = {"vocab_size": 97, "n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
BOTH_SIDES = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family and the arguments of its tiny model.

    Attributes:
        model: The model class in Transformers, as in ``LlamaForCausalLM``.
        task: The task under which Optimum exports the model.
        sizes: Arguments of the configuration class.
        config: The configuration class; None for that which the model class names.
    """

    model: str
    task: str
    sizes: Mapping[str, Any]
    config: str | None = None
