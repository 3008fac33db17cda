"""What a config.json leaves unsaid: the block layout of each family, by its model type."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnx_tricks.inspect.dimensions import Position

__all__ = ["FAMILIES", "Family"]


@dataclasses.dataclass(frozen=True)
class Family:
    """The layout of a family's blocks, as far as its config.json does not say otherwise.

    Attributes:
        position: How positions enter.
        gated: Whether feed-forward blocks are gated linear units.
        norm: Kind of the norms.
        norms: Norms of a layer that only linear layers read; a cross-attention adds one.
        final_norm: Whether a norm with a gain stands in front of the head.
        parallel: Whether attention and feed-forward block read the same input.
        normed: Whether queries and keys are normalised.
        tied: Whether the head is the embedding table, where the config does not say.
        kind: What there is of encoder and decoder.
    """

    position: Position
    gated: bool
    norm: Literal["rms", "layer"]
    norms: int = 2
    final_norm: bool = True
    parallel: bool = False
    normed: bool = False
    tied: bool = False
    kind: Literal["decoder", "encoder", "vision", "both"] = "decoder"


_LLAMA = Family("rope", gated=True, norm="rms")
_GPT2 = Family("learned", gated=False, norm="layer", tied=True)
_NEOX = Family("rope", gated=False, norm="layer", parallel=True)
_ONE_NORM = dataclasses.replace(_NEOX, norms=1)
_BERT = Family("learned", False, "layer", norms=0, final_norm=False, tied=True, kind="encoder")
_BART = Family("learned", False, "layer", norms=0, final_norm=False, tied=True, kind="both")
_T5 = Family("relative", False, "rms", tied=True, kind="both")


def _variant(base: Family, **changes: object) -> Family:
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        "llama mistral mixtral ministral qwen2 qwen2_moe granite granitemoe phi3 helium ernie4_5 "
        "seed_oss smollm3 glm gpt_oss".split(),
        _LLAMA,
    ),
    **dict.fromkeys(
        "qwen3 qwen3_moe hunyuan_v1_dense olmoe gemma3_text".split(), _variant(_LLAMA, normed=True)
    ),
    **dict.fromkeys(("gemma", "gemma2"), _variant(_LLAMA, tied=True)),
    "gemma3_text": _variant(_LLAMA, normed=True, tied=True),
    "arcee": _variant(_LLAMA, gated=False),
    "phimoe": _variant(_LLAMA, norm="layer"),
    "olmo": _variant(_LLAMA, norm="layer", norms=0, final_norm=False),  # no gains
    **dict.fromkeys(("olmo2", "exaone4"), _variant(_LLAMA, norms=0, normed=True)),
    **dict.fromkeys(("starcoder2", "persimmon", "nemotron"), _variant(_NEOX, parallel=False)),
    "stablelm": _variant(_LLAMA, norm="layer"),
    "gpt_neox": _NEOX,
    **dict.fromkeys(("gptj", "codegen", "phi"), _ONE_NORM),
    "falcon": _variant(_ONE_NORM, tied=True),
    **dict.fromkeys(("cohere", "cohere2"), _variant(_ONE_NORM, gated=True, tied=True)),
    **dict.fromkeys(("bloom", "mpt"), _variant(_GPT2, position="alibi")),
    **dict.fromkeys("gpt2 gpt_neo gpt_bigcode opt xglm biogpt".split(), _GPT2),
    **dict.fromkeys("bert roberta distilbert camembert xlm-roberta electra mpnet".split(), _BERT),
    "vit": _variant(_BERT, norms=2, final_norm=True, kind="vision"),
    **dict.fromkeys("bart marian blenderbot-small".split(), _BART),
    **dict.fromkeys(
        "mbart pegasus m2m_100 blenderbot whisper".split(),
        _variant(_BART, norms=2, final_norm=True),
    ),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
}
"""The families by their model type in Transformers."""
