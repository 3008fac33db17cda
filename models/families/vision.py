"""Families that take images, and three that take series of measurements."""

from __future__ import annotations

from typing import Any

from onnx_tricks.models.families.family import GPT, SIZES, Family

__all__ = ["VISION"]


def _classified(model: str, **sizes: Any) -> Family:
    return Family(model, "image-classification", sizes)


def _detected(model: str, **sizes: Any) -> Family:
    return Family(model, "object-detection", sizes)


_IMAGE = {"image_size": 24, "patch_size": 8}
_VIT = {**SIZES, **_IMAGE}
_BEIT = {**_VIT, "use_relative_position_bias": True, "use_absolute_position_embeddings": True}
# Four stages, each of half the resolution of the one before.
_STAGES = {"hidden_sizes": [12, 20, 36, 48], "depths": [1, 2, 1, 1]}
_FOUR = {**_STAGES, "num_attention_heads": [1, 2, 3, 4], "num_encoder_blocks": 4}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_RESNET = {"embedding_size": 12, "layer_type": "basic", **_STAGES}
_DETR = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "num_queries": 9,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        **_RESNET,
    },
}
# A pyramid of three resolutions, and decoders that look at points of it.
_POINTS = {
    "d_model": 48,
    "encoder_hidden_dim": 48,
    "encoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 72,
    "decoder_in_channels": [48, 48, 48],
    "encoder_in_channels": [20, 36, 48],
    "num_queries": 9,
    "num_denoising": 0,
    "anchor_image_size": None,
}
_PYRAMID = {
    "model_type": "rt_detr_resnet",
    "out_features": ["stage2", "stage3", "stage4"],
    **_RESNET,
}

VISION = {
    "beit": _classified("BeitForImageClassification", **_BEIT),
    "convnext": _classified("ConvNextForImageClassification", image_size=64, **_STAGES),
    "convnextv2": _classified("ConvNextV2ForImageClassification", image_size=64, **_STAGES),
    "cvt": _classified(
        "CvtForImageClassification",
        embed_dim=[12, 24, 48],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    "d_fine": _detected(
        "DFineForObjectDetection",
        **_POINTS,
        backbone_config={
            "model_type": "hgnet_v2",
            "out_features": ["stage2", "stage3", "stage4"],
            "embedding_size": 12,
            "hidden_sizes": [12, 20, 36, 48],
            "stem_channels": [3, 8, 12],
            "stage_in_channels": [12, 12, 20, 36],
            "stage_mid_channels": [8, 8, 12, 12],
            "stage_out_channels": [12, 20, 36, 48],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
        },
    ),
    "data2vec-vision": _classified("Data2VecVisionForImageClassification", **_BEIT),
    "decision_transformer": Family(
        "DecisionTransformerModel",
        "reinforcement-learning",
        {**GPT, "hidden_size": 48, "state_dim": 9, "act_dim": 5, "max_ep_len": 64},
    ),
    "deit": _classified("DeiTForImageClassification", **_VIT),
    "detr": _detected("DetrForObjectDetection", **_DETR),
    "detr_segmentation": Family(
        "DetrForSegmentation",
        "image-segmentation",
        {**_DETR, "d_model": 64, "encoder_attention_heads": 8},
    ),
    "dinov2": _classified("Dinov2ForImageClassification", **_VIT),
    "dinov2_swiglu": _classified("Dinov2ForImageClassification", **_VIT, use_swiglu_ffn=True),
    "donut-swin": Family("DonutSwinModel", "feature-extraction", _SWIN),
    "dpt": Family(
        "DPTForDepthEstimation",
        "depth-estimation",
        {
            **_VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [12, 20, 36, 48],
            "fusion_hidden_size": 16,
        },
    ),
    "efficientnet": _classified(
        "EfficientNetForImageClassification",
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
    ),
    "glpn": Family(
        "GLPNForDepthEstimation", "depth-estimation", {**_FOUR, "decoder_hidden_size": 16}
    ),
    "hiera": _classified(
        "HieraForImageClassification",
        image_size=[32, 32],
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
    ),
    "levit": _classified(
        "LevitForImageClassification",
        image_size=64,
        hidden_sizes=[16, 24, 48],
        num_attention_heads=[1, 2, 3],
        depths=[1, 2, 1],
        key_dim=[8, 8, 8],
    ),
    "maskformer": Family(
        "MaskFormerForInstanceSegmentation",
        "image-segmentation",
        {
            "fpn_feature_size": 64,
            "mask_feature_size": 20,
            "backbone_config": {
                **_SWIN,
                "model_type": "swin",
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 2, 4, 8],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "decoder_config": {"model_type": "detr", **_DETR},
        },
    ),
    "mgp-str": Family(
        "MgpstrForSceneTextRecognition",
        "feature-extraction",
        {
            **SIZES,
            "image_size": [8, 32],
            "patch_size": 4,
            "max_token_length": 5,
            "num_character_labels": 13,
            "num_bpe_labels": 17,
            "num_wordpiece_labels": 19,
        },
    ),
    "mobilenet_v1": _classified(
        "MobileNetV1ForImageClassification", image_size=32, depth_multiplier=0.25
    ),
    "mobilenet_v2": _classified(
        "MobileNetV2ForImageClassification", image_size=32, depth_multiplier=0.25
    ),
    "mobilevit": _classified(
        "MobileViTForImageClassification",
        image_size=64,
        hidden_sizes=[20, 36, 48],
        neck_hidden_sizes=[8, 8, 12, 20, 36, 48, 64],
    ),
    "patchtsmixer": Family(
        "PatchTSMixerForPrediction",
        "time-series-forecasting",
        {
            "context_length": 40,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 3,
            "d_model": 24,
            "num_layers": 2,
            "prediction_length": 5,
        },
    ),
    "patchtst": Family(
        "PatchTSTForPrediction",
        "time-series-forecasting",
        {
            "context_length": 40,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 3,
            "d_model": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 80,
            "prediction_length": 5,
            "norm_type": "layernorm",
        },
    ),
    "poolformer": _classified("PoolFormerForImageClassification", **_STAGES),
    "pvt": _classified("PvtForImageClassification", image_size=64, **_FOUR),
    "regnet": _classified(
        "RegNetForImageClassification", **{**_RESNET, "layer_type": "x"}, groups_width=4
    ),
    "resnet": _classified("ResNetForImageClassification", **_RESNET),
    "rt_detr": _detected("RTDetrForObjectDetection", **_POINTS, backbone_config=_PYRAMID),
    "rt_detr_v2": _detected("RTDetrV2ForObjectDetection", **_POINTS, backbone_config={**_PYRAMID}),
    "sam": Family(
        "SamModel",
        "feature-extraction",
        {
            "vision_config": {
                **_VIT,
                "image_size": 64,
                "mlp_dim": 80,
                "output_channels": 16,
                "window_size": 3,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 20,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
    ),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        "semantic-segmentation",
        {**_FOUR, "decoder_hidden_size": 16},
    ),
    "swin": _classified("SwinForImageClassification", **_SWIN),
    "swin2sr": Family(
        "Swin2SRForImageSuperResolution",
        "image-to-image",
        {**_SWIN, "image_size": 16, "patch_size": 1, "depths": [2], "num_heads": [2]},
    ),
    "swinv2": _classified("Swinv2ForImageClassification", **_SWIN),
    "table-transformer": _detected("TableTransformerForObjectDetection", **_DETR),
    "vit": _classified("ViTForImageClassification", **_VIT),
    # One patch, so that chance has no choice of which ones to hide.
    "vit_mae": Family(
        "ViTMAEModel", "feature-extraction", {**_VIT, "image_size": 8, "mask_ratio": 0.0}
    ),
    "vit_msn": _classified("ViTMSNForImageClassification", **_VIT),
    "vitpose": Family(
        "VitPoseForPoseEstimation",
        "keypoint-detection",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **_VIT,
                "image_size": [32, 24],
                "patch_size": [8, 8],
                "mlp_ratio": 2,
                "out_features": ["stage2"],
            }
        },
    ),
    "yolos": _detected(
        "YolosForObjectDetection",
        **{**_VIT, "image_size": [32, 24], "num_detection_tokens": 5},
    ),
}
"""The families by their model type in Transformers; a suffix tells a variant."""
