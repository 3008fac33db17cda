"""Families that take sound, and those that make it."""

from __future__ import annotations

from typing import Any

from onnx_tricks.models.families.family import SIZES, Family

__all__ = ["AUDIO"]

_WAVES = {
    **SIZES,
    "conv_dim": [12, 20, 24],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "conv_bias": True,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def _heard(model: str, **sizes: Any) -> Family:
    return Family(model, "automatic-speech-recognition", {**_WAVES, **sizes})


AUDIO = {
    "audio-spectrogram-transformer": Family(
        "ASTForAudioClassification",
        "audio-classification",
        {**SIZES, "patch_size": 8, "max_length": 40, "num_mel_bins": 24}
        | {"frequency_stride": 5, "time_stride": 5},
    ),
    "data2vec-audio": _heard("Data2VecAudioForCTC", num_conv_pos_embeddings=2),
    "hubert": _heard("HubertForCTC"),
    "hubert_stable": _heard("HubertForCTC", **_STABLE),
    "mctct": Family(
        "MCTCTForCTC",
        "automatic-speech-recognition",
        {**SIZES, "attention_head_dim": 12, "input_feat_per_channel": 20}
        | {"max_position_embeddings": 512, "conv_kernel": [12], "conv_stride": [12]},
    ),
    "musicgen": Family(
        "MusicgenForConditionalGeneration",
        "text-to-audio",
        {
            "text_encoder": {"model_type": "t5", "vocab_size": 97, "d_model": 48, "d_ff": 80}
            | {"num_layers": 2, "num_heads": 4, "d_kv": 14},
            "audio_encoder": {"model_type": "encodec", "hidden_size": 16, "num_filters": 4}
            | {"num_lstm_layers": 1, "codebook_size": 64, "codebook_dim": 16}
            | {"upsampling_ratios": [4, 2], "target_bandwidths": [1.6], "sampling_rate": 320},
            "decoder": {"model_type": "musicgen_decoder", "vocab_size": 64, "hidden_size": 36}
            | {"num_hidden_layers": 2, "ffn_dim": 72, "num_attention_heads": 4},
        },
    ),
    "sew": _heard("SEWForCTC", squeeze_factor=2),
    "sew-d": _heard("SEWDForCTC", squeeze_factor=2, position_buckets=8, max_position_embeddings=32),
    "unispeech": _heard("UniSpeechForCTC"),
    "unispeech_stable": _heard("UniSpeechForCTC", **_STABLE),
    "unispeech-sat": _heard("UniSpeechSatForCTC"),
    "vits": Family(
        "VitsModel",
        "text-to-audio",
        {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"window_size": 3, "ffn_dim": 80, "flow_size": 48, "spectrogram_bins": 33}
        | {"upsample_initial_channel": 32, "upsample_rates": [4, 2]}
        | {"upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3]}
        | {"resblock_dilation_sizes": [[1, 3]], "prior_encoder_num_flows": 2}
        | {"posterior_encoder_num_wavenet_layers": 2, "prior_encoder_num_wavenet_layers": 2}
        | {"duration_predictor_num_flows": 2, "depth_separable_num_layers": 1}
        # Without noise, so that PyTorch and the export compute the same.
        | {"noise_scale": 0.0, "noise_scale_duration": 0.0},
    ),
    "wav2vec2": _heard("Wav2Vec2ForCTC"),
    "wav2vec2_stable": _heard("Wav2Vec2ForCTC", **_STABLE),
    "wav2vec2-conformer": _heard("Wav2Vec2ConformerForCTC", position_embeddings_type="relative"),
    "wav2vec2-conformer_rotary": _heard(
        "Wav2Vec2ConformerForCTC", position_embeddings_type="rotary"
    ),
    "wavlm": _heard("WavLMForCTC", max_bucket_distance=16, num_buckets=8),
    "wavlm_stable": _heard("WavLMForCTC", max_bucket_distance=16, num_buckets=8, **_STABLE),
}
"""The families by their model type in Transformers; a suffix tells a variant."""
