"""Small random configurations of many architectures of ``transformers``: (model, configuration, options, inputs).

Options that end in ``_config`` and are given as a pair are configurations themselves.
"""

from __future__ import annotations

from typing import Any

Entry = tuple[str, str, dict[str, Any], str]

TOKENS = "input_ids=int100:2x16 attention_mask=ones:2x16"
IMAGE = "pixel_values=2x3x64x64"

#: An encoder or decoder of text, 2 layers of 64.
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
#: A vision transformer, 2 layers of 64, 16 patches.
VISION: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "bottleneck"}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "use_cache": False,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 100,
}

MODELS: dict[str, Entry] = {
    # text, both directions
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, TOKENS),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**TEXT, "pad_token_id": 1}, TOKENS),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", {**TEXT, "pad_token_id": 1}, TOKENS),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
        TOKENS,
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 32}, TOKENS),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 32}, TOKENS),
    "mpnet": ("MPNetModel", "MPNetConfig", TEXT, TOKENS),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32},
        TOKENS,
    ),
    "mobilebert": (
        "MobileBertModel",
        "MobileBertConfig",
        {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        TOKENS,
    ),
    "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", {**TEXT, "embedding_size": 64}, TOKENS),
    "convbert": ("ConvBertModel", "ConvBertConfig", {**TEXT, "embedding_size": 64}, TOKENS),
    "roformer": ("RoFormerModel", "RoFormerConfig", {**TEXT, "embedding_size": 64}, TOKENS),
    "nystromformer": (
        "NystromformerModel",
        "NystromformerConfig",
        {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 16},
        "input_ids=int100:2x16",
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**TEXT, "pad_token_id": 0, "global_attn_every_n_layers": 2},
        TOKENS,
    ),
    "layoutlm": ("LayoutLMModel", "LayoutLMConfig", TEXT, "input_ids=int100:2x16 bbox=ones:2x16x4"),
    # text, left to right
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
        TOKENS,
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        TOKENS,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "use_cache": False}, TOKENS),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        TOKENS,
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
        TOKENS,
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TEXT, "ffn_hidden_size": 128, "use_cache": False}, TOKENS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, TOKENS),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "head_dim": 16}, TOKENS),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        TOKENS,
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, TOKENS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, TOKENS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}, TOKENS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16}, TOKENS),
    "phi": ("PhiForCausalLM", "PhiConfig", GROUPED, TOKENS),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, TOKENS),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED, TOKENS),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED, TOKENS),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
        "input_ids=int100:2x16",
    ),
    # text to text
    "t5-encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        TOKENS,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 100,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        TOKENS + " decoder_input_ids=int100:2x8",
    ),
    "bart": ("BartModel", "BartConfig", SEQ2SEQ, TOKENS + " decoder_input_ids=int100:2x8"),
    # images
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION, IMAGE),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        IMAGE,
    ),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, IMAGE),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**VISION, "image_size": [64, 64], "num_detection_tokens": 5},
        IMAGE,
    ),
    "dpt": (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 48, 64],
            "fusion_hidden_size": 32,
        },
        IMAGE,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        IMAGE,
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        IMAGE,
    ),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES, IMAGE),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES, IMAGE),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, IMAGE),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 16, **STAGES, "groups_width": 16},
        IMAGE,
    ),
    "mobilenet-v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, IMAGE),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}, IMAGE),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        IMAGE,
    ),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", {**STAGES, "depths": [1, 1, 1, 1]}, IMAGE),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
        IMAGE,
    ),
    "cvt": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
        IMAGE,
    ),
    "pvt": (
        "PvtForImageClassification",
        "PvtConfig",
        {"image_size": 64, **STAGES, "num_attention_heads": [1, 2, 3, 4]},
        IMAGE,
    ),
    "focalnet": (
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 1]},
        IMAGE,
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
        IMAGE,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        },
        IMAGE,
    ),
    "upernet": (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {
            "backbone_config": ("ConvNextConfig", {**STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
            "hidden_size": 32,
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 48,
        },
        IMAGE,
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": ("ResNetConfig", {**RESNET, "out_features": ["stage4"]}),
            "num_queries": 5,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
        IMAGE,
    ),
    "videomae": (
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**VISION, "num_frames": 4},
        "pixel_values=2x4x3x64x64",
    ),
    # images and text, sound
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": ("CLIPTextConfig", TEXT), "vision_config": ("CLIPVisionConfig", VISION), "projection_dim": 32},
        f"input_ids=int100:2x16 {IMAGE} attention_mask=ones:2x16",
    ),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", VISION, IMAGE),
    "siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", VISION, IMAGE),
    "whisper-encoder": (
        "WhisperModel.encoder",
        "WhisperConfig",
        {**SEQ2SEQ, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16, "pad_token_id": 0},
        "input_features=2x16x64",
    ),
    "whisper": (
        "WhisperModel",
        "WhisperConfig",
        {**SEQ2SEQ, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16, "pad_token_id": 0},
        "input_features=2x16x64 decoder_input_ids=int100:2x8",
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", AUDIO, "input_values=2x800"),
    "hubert": ("HubertModel", "HubertConfig", AUDIO, "input_values=2x800"),
    "ast": (
        "ASTForAudioClassification",
        "ASTConfig",
        {k: v for k, v in VISION.items() if k != "image_size"} | {"num_mel_bins": 32, "max_length": 64},
        "input_values=2x64x32",
    ),
}
