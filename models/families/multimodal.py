"""Families that take images together with text."""

from __future__ import annotations

from onnx_tricks.models.families.family import SIZES, Family

__all__ = ["MULTIMODAL"]

_TEXT = {**SIZES, "eos_token_id": 96, "bos_token_id": 95, "pad_token_id": 1}
_IMAGE = {**SIZES, "image_size": 24, "patch_size": 8}
_PAIR = {"text_config": _TEXT, "vision_config": {**_IMAGE, "hidden_size": 36}}
_JOINT = {**_PAIR, "projection_dim": 20}
_POINTED = {**_PAIR, "projection_dim": 48}
_CLASSES = "zero-shot-image-classification"

MULTIMODAL = {
    "chinese_clip": Family("ChineseCLIPModel", _CLASSES, _JOINT),
    "clip": Family("CLIPModel", _CLASSES, _JOINT),
    "clip_vision_model": Family("CLIPVisionModel", "feature-extraction", _IMAGE),
    "colpali": Family(
        "ColPaliForRetrieval",
        "feature-extraction",
        {
            "embedding_dim": 20,
            "vlm_config": {
                "model_type": "paligemma",
                "image_token_index": 97,
                "projection_dim": 48,
                "text_config": {
                    "model_type": "gemma",
                    **_TEXT,
                    "num_key_value_heads": 1,
                    "head_dim": 12,
                },
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    **_IMAGE,
                    "hidden_size": 36,
                    "num_image_tokens": 9,
                },
            },
        },
    ),
    "groupvit": Family(
        "GroupViTModel",
        "feature-extraction",
        {
            "text_config": _TEXT,
            "vision_config": {**_IMAGE, "depths": [2, 1], "num_group_tokens": [5, 0]}
            | {"num_output_groups": [5, 3], "patch_size": 4},
            "projection_dim": 20,
            "projection_intermediate_dim": 40,
        },
    ),
    "layoutlmv3": Family(
        "LayoutLMv3ForTokenClassification",
        "token-classification",
        {**SIZES, "max_position_embeddings": 66, "coordinate_size": 8, "shape_size": 8}
        | {"max_2d_position_embeddings": 1024, "input_size": 24, "patch_size": 8}
        | {"pad_token_id": 1, "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 8},
    ),
    "metaclip_2": Family("MetaClip2Model", _CLASSES, _JOINT),
    "owlv2": Family("Owlv2ForObjectDetection", "zero-shot-object-detection", _POINTED),
    "owlvit": Family("OwlViTForObjectDetection", "zero-shot-object-detection", _POINTED),
    "siglip": Family("SiglipModel", _CLASSES, {**_PAIR, "vision_config": _IMAGE}),
    "siglip_vision_model": Family("SiglipVisionModel", "feature-extraction", _IMAGE),
    "visual_bert": Family(
        "VisualBertModel", "feature-extraction", {**SIZES, "visual_embedding_dim": 20}
    ),
}
"""The families by their model type in Transformers; a suffix tells a variant."""
