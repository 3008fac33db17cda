"""The dimensions that a Hugging Face config.json states."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from onnx_tricks.errors import ModelError
from onnx_tricks.inspect.dimensions import Attention, Dimensions, Encoder, FeedForward, Position
from onnx_tricks.inspect.families import FAMILIES, Family

__all__ = ["read_config"]

_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
# Keys for the same number, in the order in which they count: those of a decoder come first.
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = tuple(
    "decoder_layers num_decoder_layers num_hidden_layers n_layer n_layers num_layers".split()
)
_HEADS = tuple(
    "decoder_attention_heads num_attention_heads n_head n_heads num_heads attention_heads".split()
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_FFN = tuple(
    "decoder_ffn_dim ffn_hidden_size intermediate_size n_inner d_ff ffn_dim hidden_dim".split()
)
_CONTEXT = tuple(
    "max_target_positions max_position_embeddings n_positions max_seq_len seq_length n_ctx".split()
)
_EXPERTS = ("num_local_experts", "num_experts")


def read_config(path: Path) -> Dimensions:
    """Read the dimensions of a model from its config.json.

    The genai_config.json of onnxruntime-genai is read as well; it does not tell of feed-forward
    blocks.

    Args:
        path: The file.

    Raises:
        ModelError: It is no JSON object, its family is not known, or a key is missing or is not a
            positive whole number.
    """
    data = _load(path)
    model = data.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if "model_type" in data or not isinstance(model, dict) or not isinstance(decoder, dict):
        return _Config(path, data).dimensions()
    data = {
        **decoder,
        "model_type": model.get("type"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
        "head_dim": decoder.get("head_size"),
    }
    return dataclasses.replace(_Config(path, data).dimensions(), ffn=None)


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: is not a JSON object, as a config.json is")
    return data


class _Config:
    """A config.json under the names of one family."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        # Models with vision or audio keep the language model's configuration apart.
        inner = data.get("text_config")
        if data.get("model_type") not in FAMILIES and isinstance(inner, dict):
            data = {"dtype": data.get("dtype", data.get("torch_dtype")), **inner}
        self.path, self.data = path, data
        self.model_type = data.get("model_type")
        self.family = self._family()

    def dimensions(self) -> Dimensions:
        family, data = self.family, self.data
        width = self.integer(_WIDTH)
        layers = self.integer(_LAYERS)
        norms = family.norms
        if "num_ln_in_parallel_attn" in data or data.get("new_decoder_architecture"):
            norms = 2 if data.get("new_decoder_architecture") else norms
        if data.get("do_layer_norm_before") is False:  # OPT 350M
            norms = 0
        encoder = self.encoder(width) if family.kind == "both" else None
        item = self.item_bytes()
        return Dimensions(
            model_type=str(self.model_type),
            width=width,
            layers=layers,
            vocabulary=0 if family.kind == "vision" else self.integer(("vocab_size",)),
            attention=self.attention(width, layers),
            ffn=self.feed_forward(width),
            context=self.integer(_CONTEXT) if self.has(_CONTEXT) else None,
            parallel=self.parallel(),
            tied=bool(data.get("tie_word_embeddings", family.tied)),
            has_head=family.kind in ("decoder", "both"),
            decodes=family.kind in ("decoder", "both"),
            norm=family.norm,
            foldable_norms=layers * (norms + (encoder is not None and norms > 0))
            + (encoder.layers * norms if encoder else 0)
            + family.final_norm,
            encoder=encoder,
            weight_bytes=item,
            cache_bytes=item,
        )

    def attention(self, width: int, layers: int) -> Attention:
        heads = self.integer(_HEADS)
        window, windowed = self.window(layers)
        return Attention(
            heads=heads,
            kv_heads=self.kv_heads(heads),
            head_width=self.integer(("head_dim", "d_kv"), width // heads),
            position=self.position(),
            normed=self.family.normed
            or any(self.data.get(key) for key in ("use_qk_norm", "qk_layernorm")),
            window=window,
            windowed=windowed,
        )

    def kv_heads(self, heads: int) -> int:
        if self.data.get("new_decoder_architecture"):  # Falcon 40B and later
            return self.integer(_KV_HEADS, heads)
        if self.data.get("multi_query", self.model_type in ("falcon", "gpt_bigcode")):
            return 1
        nested = self.data.get("attn_config")
        if isinstance(nested, dict) and nested.get("kv_n_heads"):
            return int(nested["kv_n_heads"])
        return self.integer(_KV_HEADS, heads)

    def position(self) -> Position:
        nested = self.data.get("attn_config")
        nested = nested if isinstance(nested, dict) else {}
        alibi = self.data.get("alibi", nested.get("alibi"))
        if alibi is True:
            return "alibi"
        if alibi is False and self.model_type == "mpt":
            return "rope" if nested.get("rope") else "learned"
        return self.family.position

    def parallel(self) -> bool:
        keys = ("use_parallel_residual", "parallel_attn")
        stated = [bool(self.data[key]) for key in keys if key in self.data]
        stated.append(bool(self.data.get("new_decoder_architecture")))
        return any(stated) if len(stated) > 1 or stated[0] else self.family.parallel

    def feed_forward(self, width: int) -> FeedForward:
        experts = 1
        if self.has(_EXPERTS):
            experts = self.integer(_EXPERTS)
        expert_width = self.integer(("moe_intermediate_size",), 0) if experts > 1 else 0
        mixed = self.data.get("mlp_only_layers") or self.data.get("decoder_sparse_step", 1) != 1
        if experts > 1 and mixed:
            raise ModelError(
                f"{self.path}: layers with and without experts are mixed ('mlp_only_layers', "
                "'decoder_sparse_step'), which is not counted here; inspect the exported model"
            )
        dense = self.integer(_FFN, 4 * width)
        if self.model_type in ("bloom", "mpt"):  # they know no key for it
            dense = self.integer(("expansion_ratio",), 4) * width
        return FeedForward(
            width=expert_width or dense,
            gated=self.gated(),
            experts=experts,
            chosen=self.integer(("num_experts_per_tok",)) if experts > 1 else 1,
            shared_width=self.integer(("shared_expert_intermediate_size",), 0),
        )

    def gated(self) -> bool:
        stated = self.data.get("is_gated_act", self.data.get("feed_forward_proj"))
        if isinstance(stated, str):
            return stated.startswith("gated")
        return self.family.gated if stated is None else bool(stated)

    def encoder(self, width: int) -> Encoder:
        decoder = self.feed_forward(width)
        own = FeedForward(self.integer(("encoder_ffn_dim",), decoder.width), decoder.gated)
        reads_features = self.model_type == "whisper"
        return Encoder(
            layers=self.integer(("encoder_layers", "num_layers")),
            tokens=self.integer(("max_source_positions",), 1500) if reads_features else None,
            embeds_tokens=not reads_features,
            ffn=own,
        )

    def window(self, layers: int) -> tuple[int | None, int]:
        """The sliding window and how many layers have it."""
        window = self.data.get("sliding_window", self.data.get("window_size"))
        if not window or self.data.get("use_sliding_window") is False:
            return None, 0
        types = self.data.get("layer_types", self.data.get("attention_layers"))
        if isinstance(types, list):
            return window, sum(one in ("sliding_attention", "local") for one in types)
        if self.model_type in ("gemma2", "gpt_neo", "gpt_oss"):  # every other layer
            return window, (layers + 1) // 2
        if self.model_type in ("gemma3_text", "cohere2", "exaone4"):
            pattern = self.data.get("sliding_window_pattern") or _PATTERN[self.model_type]
            return window, layers - layers // pattern
        return window, layers

    def item_bytes(self) -> int:
        name = self.data.get("dtype") or self.data.get("torch_dtype") or "float32"
        size = _ITEM_BYTES.get(str(name).removeprefix("torch."))
        if size is None:
            known = ", ".join(_ITEM_BYTES)
            raise ModelError(f"{self.path}: the key 'dtype' is {name!r}, not one of {known}")
        return size

    def has(self, keys: tuple[str, ...]) -> bool:
        return any(self.data.get(key) is not None for key in keys)

    def integer(self, keys: tuple[str, ...], default: int | None = None) -> int:
        """The whole number under the first of the keys that is there."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if type(value) is not int or value < 0 or (value == 0 and default != 0):
                raise ModelError(
                    f"{self.path}: the key {key!r} is {value!r}, not a positive whole number"
                )
            return value
        if default is None:
            names = " or ".join(repr(key) for key in keys)
            raise ModelError(
                f"{self.path}: the key {names} is missing; add it, or inspect the exported model"
            )
        return default

    def _family(self) -> Family:
        if "kv_lora_rank" in self.data:
            raise ModelError(
                f"{self.path}: the model uses multi-head latent attention ('kv_lora_rank'), which "
                "is not counted here; inspect the exported model"
            )
        if not isinstance(self.model_type, str):
            raise ModelError(f"{self.path}: the key 'model_type' is missing, so that the layout "
                             "of the blocks is not known")  # fmt: skip
        if self.model_type not in FAMILIES:
            raise ModelError(
                f"{self.path}: the model_type {self.model_type!r} is not known; inspect the "
                "exported model, or put a known one with the same layout there, such as 'llama'"
            )
        return FAMILIES[self.model_type]


_PATTERN = {"gemma3_text": 6, "cohere2": 4, "exaone4": 4}
