"""Every released and published configuration, one zero-argument function each, next to its source.

Papers: Perceiver IO, arXiv 2107.14795 ("IO"); Perceiver, arXiv 2103.03206 ("P1"). Released: the constructor arguments in
deepmind-research perceiver/colabs. Parameter counts are tested.
"""

from typing import Any

from .configuration_perceiver_io import PerceiverIOConfig


def language_bytes() -> PerceiverIOConfig:
    """Released: masked language model on UTF-8 bytes, 201,108,230 parameters. masked_language_modelling.ipynb; IO T11."""
    return _language(vocab_size=262, length=2048)


def language_sentencepiece() -> PerceiverIOConfig:
    """Published: Perceiver IO Base on 32,000 SentencePiece tokens, 223.16M parameters. IO T1, T11; heads as released."""
    config = _language(vocab_size=32_000, length=512)
    # The paper's tokenizer is not released: no special ids are known.
    config.mask_token_id = config.cls_token_id = config.sep_token_id = None
    return config


def language_bytes_plus() -> PerceiverIOConfig:
    """Published: Perceiver IO++ on UTF-8 bytes, 425.61M parameters. IO T1, T11; heads and qk width as released."""
    return _language(vocab_size=262, length=2048, d_latents=1536, num_self_attends_per_block=40, v_channels=1536)


def imagenet_learned() -> PerceiverIOConfig:
    """Released: ImageNet, 1x1 convolution and learned positions, 62,255,848 parameters. imagenet_classification.ipynb."""
    position = {"kind": "trainable", "num_positions": 224 * 224, "channels": 256, "grid": [224, 224]}
    return _imagenet(
        preprocessor={
            "kind": "grid",
            "stem": {"kind": "conv1x1", "in_channels": 3, "channels": 256},
            "position": {"kind": "projected", "position": position, "channels": 256},
        },
        # The released decoder of this one model has no query residual.
        decoder_use_query_residual=False,
    )


def imagenet_fourier() -> PerceiverIOConfig:
    """Released: ImageNet, raw pixels and 2D Fourier positions, 48,440,627 parameters. imagenet_classification.ipynb."""
    return _imagenet(preprocessor=_pixels_fourier())


def imagenet_conv() -> PerceiverIOConfig:
    """Released: ImageNet, convolution and max-pool to 56x56, 48,646,522 parameters. imagenet_classification.ipynb."""
    return _imagenet(
        preprocessor={
            "kind": "grid",
            "stem": {"kind": "conv", "in_channels": 3, "channels": 64},
            "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [56, 56]},
        }
    )


def imagenet_config_b() -> PerceiverIOConfig:
    """Published: ImageNet config B (JFT pre-training), 16 unshared layers widened by 4, 213.08M parameters (the
    paper prints 212M). IO A.2.
    """
    return _imagenet(
        preprocessor={
            "kind": "grid",
            "stem": {"kind": "conv1x1", "in_channels": 3, "channels": 256},
            "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [224, 224]},
        },
        num_blocks=1,
        num_self_attends_per_block=16,
        self_attention_widening_factor=4,
        cross_attention_widening_factor=1,
    )


def optical_flow() -> PerceiverIOConfig:
    """Released: flow between two 368x496 frames of 3x3 patches, 41,057,134 parameters. optical_flow.ipynb; IO T16, row 1."""
    return _flow(num_latents=2048, depth=24)


def optical_flow_small() -> PerceiverIOConfig:
    """Published sizes: flow with 16 layers and 1,024 latents, 27.91M parameters, the paper's 987 GFLOPs. IO H."""
    return _flow(num_latents=1024, depth=16)


def multimodal_autoencoder() -> PerceiverIOConfig:
    """Released: video, audio and label autoencoding (88x), 19,858,855 parameters. video_autoencoding.ipynb; IO 4.3.

    The notebook's masks: the label is always replaced by its mask token.
    """
    video = {"kind": "fourier", "num_bands": 32, "max_resolution": [16, 56, 56]}
    sound = {"kind": "fourier", "num_bands": 192, "max_resolution": [30_720]}
    return PerceiverIOConfig(
        num_latents=784,
        d_latents=512,
        num_blocks=1,
        num_self_attends_per_block=8,
        num_self_attention_heads=8,
        num_cross_attention_heads=1,
        qk_channels=None,
        v_channels=None,
        decoder_num_heads=1,
        decoder_qk_channels=None,
        decoder_v_channels=None,
        decoder_use_query_residual=False,
        num_labels=700,
        preprocessor={
            "kind": "multimodal",
            "min_padding_size": 4,
            "mask_probs": {"image": 0.0, "audio": 0.0, "label": 1.0},
            "modalities": {
                "audio": {
                    "kind": "grid",
                    "stem": {"kind": "audio_patches", "samples_per_patch": 16},
                    "position": sound,
                },
                "image": {
                    "kind": "grid",
                    "stem": {"kind": "patches", "in_channels": 3, "spatial_downsample": 4},
                    "position": video,
                },
                "label": {"kind": "vector", "channels": 700},
            },
        },
        output_query={
            "kind": "multimodal",
            "min_padding_size": 2,
            "modalities": {
                # The released model was trained on sub-sampled points: -1 + 2 i / n, also when every point is asked for.
                "audio": {"kind": "position", "position": {**sound, "rule": "sampled"}},
                "image": {"kind": "position", "position": {**video, "rule": "sampled"}, "scale": [1, 4, 4]},
                "label": {"kind": "tasks", "channels": 1024},
            },
        },
        postprocessor={
            "kind": "multimodal",
            "channels": 512,
            "modalities": {
                "audio": {"kind": "audio", "samples_per_patch": 16},
                "image": {"kind": "projection", "num_outputs": 3, "on_grid": True},
                "label": {"kind": "classification"},
            },
        },
    )


def original_perceiver_imagenet() -> PerceiverIOConfig:
    """Published: the original Perceiver, 8 reads of 224x224 pixels, 44.91M parameters. P1 4.1, T7.

    Cross-attends 2 to 8 share their weights, and so do all latent transformers.
    """
    return _original(cross_attend_sharing="after_first", block_sharing="all")


def original_perceiver_imagenet_unshared() -> PerceiverIOConfig:
    """Published ablation: the same without weight sharing, 326.24M parameters. P1 T7."""
    return _original(cross_attend_sharing="none", block_sharing="none")


def _language(*, vocab_size: int, length: int, **changes: Any) -> PerceiverIOConfig:
    position = {"kind": "trainable", "num_positions": length, "channels": 768}
    return PerceiverIOConfig(
        vocab_size=vocab_size,
        preprocessor={"kind": "text", "channels": 768, "position": dict(position)},
        output_query={"kind": "position", "position": dict(position), "use_input_mask": True},
        postprocessor={"kind": "tokens"},
        **changes,
    )


def _pixels_fourier() -> dict[str, Any]:
    return {
        "kind": "grid",
        "stem": {"kind": "pixels", "in_channels": 3},
        "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [224, 224]},
    }


def _imagenet(**changes: Any) -> PerceiverIOConfig:
    """Config A: 512 x 1,024 latents, 8 blocks of 6 self-attends with shared weights."""
    fields: dict[str, Any] = {
        "num_latents": 512,
        "d_latents": 1024,
        "num_blocks": 8,
        "num_self_attends_per_block": 6,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 1,
        "qk_channels": None,
        "v_channels": None,
        "decoder_num_heads": 1,
        "decoder_qk_channels": None,
        "decoder_v_channels": None,
        "decoder_use_query_residual": True,
        "num_labels": 1000,
        "output_query": {"kind": "tasks", "channels": 1024},
        "postprocessor": {"kind": "classification"},
    }
    return PerceiverIOConfig(**{**fields, **changes})


def _flow(*, num_latents: int, depth: int) -> PerceiverIOConfig:
    return PerceiverIOConfig(
        num_latents=num_latents,
        d_latents=512,
        num_blocks=1,
        num_self_attends_per_block=depth,
        num_self_attention_heads=16,
        num_cross_attention_heads=1,
        qk_channels=None,
        v_channels=None,
        decoder_num_heads=1,
        decoder_qk_channels=None,
        decoder_v_channels=None,
        decoder_use_query_residual=False,
        preprocessor={
            "kind": "grid",
            "stem": {"kind": "patches", "in_channels": 27, "temporal_downsample": 2, "project": 64},
            "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [368, 496]},
        },
        output_query={"kind": "input"},
        postprocessor={"kind": "flow", "rescale_factor": 100.0},
    )


def _original(**sharing: Any) -> PerceiverIOConfig:
    return _imagenet(
        preprocessor=_pixels_fourier(),
        output_query=None,
        postprocessor={"kind": "average"},
        cross_attend_before_blocks=list(range(8)),
        **sharing,
    )
