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


def language_bytes_128_latents() -> PerceiverIOConfig:
    """Published ablation: 128 latents of 1,920 channels, 430.13M parameters (ours). IO T15, GLUE 75.84."""
    return _language(vocab_size=262, length=2048, num_latents=128, d_latents=1920, v_channels=1920)


def language_bytes_512_latents() -> PerceiverIOConfig:
    """Published ablation: 512 latents of 896 channels, 105.85M parameters (ours). IO T15, GLUE 80.92."""
    return _language(vocab_size=262, length=2048, num_latents=512, d_latents=896, v_channels=896)


# Classes by task, in the order of their indices; [] for STS-B, a number from 0 to 5. WNLI is left out, as in the paper.
GLUE_TASKS: dict[str, list[str]] = {
    "CoLA": ["unacceptable", "acceptable"],
    "MNLI": ["entailment", "neutral", "contradiction"],
    "MRPC": ["not_equivalent", "equivalent"],
    "QNLI": ["entailment", "not_entailment"],
    "QQP": ["not_duplicate", "duplicate"],
    "RTE": ["entailment", "not_entailment"],
    "SST-2": ["negative", "positive"],
    "STS-B": [],
}


def glue_single_task() -> PerceiverIOConfig:
    """Published: one GLUE task on bytes, a query and a two-layer tanh head of its own, 200.13M parameters (ours). IO 4.1,
    F.4. The query is as wide as the language model's, 768 (T11; T6 says 1,280), so that all of the decoder is reused.
    """
    config = _language(vocab_size=262, length=2048)
    config.output_query = {"kind": "tasks", "channels": 768}
    config.postprocessor = {"kind": "classification", "hidden": 768}
    config.num_labels = 2
    return config


def glue_multitask_query() -> PerceiverIOConfig:
    """Published: eight GLUE tasks, a query and a head for each, 204.28M parameters (ours). IO 4.1, T2, T14: 81.8."""
    config = glue_single_task()
    config.output_query = {"kind": "tasks", "channels": 768, "num_tasks": len(GLUE_TASKS)}
    config.postprocessor = {"kind": "multitask", "tasks": GLUE_TASKS, "hidden": 768}
    return config


def glue_shared_token() -> PerceiverIOConfig:
    """Published: eight GLUE tasks, asked at the place of a first token they share, 205.85M parameters (ours). IO 4.1, T2,
    T14: 81.5.
    """
    config = _language(vocab_size=262, length=2048)
    config.postprocessor = {"kind": "multitask", "tasks": GLUE_TASKS, "hidden": 768, "at_first_token": True}
    return config


def glue_task_tokens() -> PerceiverIOConfig:
    """Published: the same, and each task has a first token of its own, 205.85M parameters (ours). IO 4.1, T2, T14: 81.8.

    The tokens are ids 262 to 269, after the bytes.
    """
    config = glue_shared_token()
    config.vocab_size += len(GLUE_TASKS)
    return config


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
    return _imagenet(preprocessor=_conv_fourier())


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
        **_CONFIG_B,
    )


def imagenet_config_b_conv() -> PerceiverIOConfig:
    """Published: the same after a convolution and max-pool, 212.38M parameters. IO A.2, T7: 86.4."""
    return _imagenet(preprocessor=_conv_fourier(), **_CONFIG_B)


def imagenet_fourier_average() -> PerceiverIOConfig:
    """Published: imagenet_fourier read out from the mean latent, as in the original Perceiver, 42.14M parameters. IO T7."""
    return _averaged(imagenet_fourier())


def imagenet_learned_average() -> PerceiverIOConfig:
    """Published: imagenet_learned read out from the mean latent, 55.95M parameters. IO T7, top-1 67.6."""
    return _averaged(imagenet_learned())


def imagenet_conv_average() -> PerceiverIOConfig:
    """Published: imagenet_conv read out from the mean latent, 42.34M parameters. IO T7, top-1 77.4."""
    return _averaged(imagenet_conv())


def optical_flow() -> PerceiverIOConfig:
    """Released: flow between two 368x496 frames of 3x3 patches, 41,057,134 parameters. optical_flow.ipynb; IO T16, row 1."""
    return _flow(_patches(27, frames=2), _positions(368, 496))


def optical_flow_separate() -> PerceiverIOConfig:
    """Published: 3x3 patches of each frame by itself, positions in time too, queries of the first frame, 41.72M
    parameters (ours). IO T16, row 2.
    """
    return _flow(_patches(27), _positions(2, 368, 496))


def optical_flow_pixels() -> PerceiverIOConfig:
    """Published: pixels (1x1 patches) of both frames, 41.05M parameters (ours). IO T16, row 3."""
    return _flow(_patches(3, frames=2), _positions(368, 496))


def optical_flow_pixels_separate() -> PerceiverIOConfig:
    """Published: pixels of each frame by itself, 41.72M parameters (ours). IO T16, row 4."""
    return _flow(_patches(3), _positions(2, 368, 496))


def optical_flow_conv() -> PerceiverIOConfig:
    """Published: both frames through a convolution to 92x124, upsampled as in RAFT, 41.10M parameters (ours). IO T16,
    row 5; BatchNorm as in DeepMind's Conv2DDownsample, the bands up to the grid's own resolution as in their ImageNet.
    """
    return _flow(_flow_conv(frames=2), _positions(92, 124), upsample=True)


def optical_flow_conv_separate() -> PerceiverIOConfig:
    """Published: each frame by itself through that convolution, 41.77M parameters (ours). IO T16, row 6."""
    return _flow(_flow_conv(), _positions(2, 92, 124), upsample=True)


def optical_flow_light() -> PerceiverIOConfig:
    """Published: the light model, convolution of both frames, 16 layers, 1,024 latents, 27.95M parameters (ours). IO T16,
    row 7.
    """
    return _flow(_flow_conv(frames=2), _positions(92, 124), upsample=True, num_latents=1024, depth=16)


def optical_flow_small() -> PerceiverIOConfig:
    """Published sizes: flow with 16 layers and 1,024 latents, 27.91M parameters, the paper's 987 GFLOPs. IO H."""
    return _flow(_patches(27, frames=2), _positions(368, 496), num_latents=1024, depth=16)


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


def multimodal_autoencoder_88x() -> PerceiverIOConfig:
    """Published: the released autoencoder as it is trained, 784 latents, 88x smaller than its input. IO 4.3, T4, I.

    Losses 0.03 L1(image) + L1(audio) + 0.0001 cross-entropy(label) at 512 pixels and 512 audio patches of each example;
    the label is masked half of the time in training, always at inference.
    """
    return _autoencoder(num_latents=784)


def multimodal_autoencoder_176x() -> PerceiverIOConfig:
    """Published: the same with 392 latents, 19,658,151 parameters. IO T4."""
    return _autoencoder(num_latents=392)


def multimodal_autoencoder_352x() -> PerceiverIOConfig:
    """Published: the same with 196 latents, 19,557,799 parameters. IO T4."""
    return _autoencoder(num_latents=196)


def multimodal_autoencoder_88x_label() -> PerceiverIOConfig:
    """Published: 88x with weight 1 on the label: 45 % top-1 instead of 10 %, video PSNR 20.7 instead of 24.4. IO 4.3."""
    return _autoencoder(num_latents=784, label_weight=1.0)


def starcraft_entities() -> PerceiverIOConfig:
    """Published: 512 entities in and out, 32 latents, 3 self-attends, 6.63M parameters (ours). IO B, T5, T9.

    Vectors of 256 channels without positions, each of which asks and gets 128 (T5; T6 says 128 in); absent ones are masked.
    The latents' width is not stated: 512 needs 1.0 GFLOPs, the paper 0.93; 256 and 1,024 need 0.6 and 2.4.
    """
    return _imagenet(
        num_latents=32,
        d_latents=512,
        num_blocks=1,
        num_self_attends_per_block=3,
        preprocessor=_one_modality("entities", {"kind": "points", "feature_channels": 256}),
        output_query=_one_modality("entities", {"kind": "input"}),
        postprocessor={
            "kind": "multimodal",
            "modalities": {"entities": {"kind": "projection", "num_outputs": 128}},
        },
    )


def audioset_raw() -> PerceiverIOConfig:
    """Published: AudioSet's 527 labels from 32 frames and 61,440 samples, 13,024 x 487 inputs, 24.92M parameters. IO C,
    T10, mAP 43.3. 16 video bands follow from the width 487; those of the sound are not stated.
    """
    return _audioset(_sound_patches(), d_latents=512)


def audioset_mel() -> PerceiverIOConfig:
    """Published: the same from a 60x80 log-mel spectrogram, 17,344 x 487 inputs, latents of 1,024 channels, 86.57M
    parameters (the paper prints 88.2M). IO C, T10, mAP 44.9.
    """
    return _audioset(_spectrogram(), d_latents=1024)


def audioset_raw_average() -> PerceiverIOConfig:
    """Published: audioset_raw read out from the mean latent, as in the original Perceiver, 20.97M parameters. IO T10."""
    return _audioset(_sound_patches(), d_latents=512, **_AVERAGE)


def audioset_mel_average() -> PerceiverIOConfig:
    """Published: the same from a spectrogram, latents of 512 channels, 20.97M parameters. IO T10, mAP 43.6."""
    return _audioset(_spectrogram(), d_latents=512, **_AVERAGE)


def original_perceiver_audioset_raw() -> PerceiverIOConfig:
    """Published: 2 reads, 8 self-attends after each, nothing shared. P1 4.2, mAP 43.5.

    Number and width of the latents are not stated; these are IO's (T10).
    """
    return _audioset(_sound_patches(), d_latents=512, **_TWO_READS)


def original_perceiver_audioset_mel() -> PerceiverIOConfig:
    """Published: the same from a spectrogram, as tuned: 10 % of the spectrograms are dropped too. P1 4.2, mAP 44.2."""
    return _audioset(_spectrogram(), d_latents=512, dropout={"image": 0.3, "audio": 0.1}, **_TWO_READS)


def original_perceiver_audioset_mel_augmented() -> PerceiverIOConfig:
    """Published: the same before that, with SpecAugment in place of dropped spectrograms. P1 4.2, T3, mAP 43.2."""
    return _audioset(_spectrogram(), d_latents=512, **_TWO_READS)


def original_perceiver_audioset_raw_only() -> PerceiverIOConfig:
    """Published: AudioSet from its sound alone, 27.63M parameters (ours). P1 T3, mAP 38.3."""
    return _alone(_sound_patches())


def original_perceiver_audioset_mel_only() -> PerceiverIOConfig:
    """Published: AudioSet from its spectrogram alone, 27.17M parameters (ours). P1 T3, mAP 38.4."""
    return _alone(_spectrogram())


def original_perceiver_audioset_video_only() -> PerceiverIOConfig:
    """Published: AudioSet from its video alone, 28.76M parameters (ours). P1 T3, mAP 25.8."""
    return _alone(_video_patches())


def original_perceiver_modelnet40() -> PerceiverIOConfig:
    """Published: 40 classes of shapes from some 2,000 points each, 2 reads, 6 self-attends after each, 44.77M parameters
    (ours). P1 4.3, T4, top-1 85.7. 1,120 is the highest frequency, so max_resolution is 2,240.
    """
    position = {"kind": "fourier", "num_bands": 64, "max_resolution": [2240, 2240, 2240]}
    return _imagenet(
        preprocessor={"kind": "points", "position": position},
        num_labels=40,
        num_blocks=2,
        cross_attend_before_blocks=[0, 1],
        cross_attend_sharing="after_first",
        **_AVERAGE,
    )


def original_perceiver_imagenet() -> PerceiverIOConfig:
    """Published: the original Perceiver, 8 reads of 224x224 pixels, 44.91M parameters. P1 4.1, T7.

    Cross-attends 2 to 8 share their weights, and so do all latent transformers.
    """
    return _original(cross_attend_sharing="after_first", block_sharing="all")


def original_perceiver_imagenet_unshared() -> PerceiverIOConfig:
    """Published ablation: the same without weight sharing, 326.24M parameters. P1 T7."""
    return _original(cross_attend_sharing="none", block_sharing="none")


def original_perceiver_imagenet_learned() -> PerceiverIOConfig:
    """Published: learned positions of 128 channels after the pixels, one read, 48.19M parameters (ours). P1 4.1, T2, top-1
    70.9; they start at a scale of 1 (P1 B).
    """
    position = {
        "kind": "trainable",
        "num_positions": 224 * 224,
        "channels": 128,
        "grid": [224, 224],
        "init_scale": 1.0,
    }
    return _imagenet(
        preprocessor={"kind": "grid", "stem": {"kind": "pixels", "in_channels": 3}, "position": position}, **_AVERAGE
    )


def original_perceiver_imagenet_small() -> PerceiverIOConfig:
    """Published: what P1 Fig. 5 varies: 2 reads, 4 self-attends after each, nothing shared, 512 x 512 latents, 15.26M
    parameters (ours).
    """
    return _original(
        d_latents=512,
        num_blocks=2,
        num_self_attends_per_block=4,
        cross_attend_before_blocks=[0, 1],
        cross_attend_sharing="none",
        block_sharing="none",
    )


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


def _conv_fourier() -> dict[str, Any]:
    return {
        "kind": "grid",
        "stem": {"kind": "conv", "in_channels": 3, "channels": 64},
        "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [56, 56]},
    }


_CONFIG_B: dict[str, Any] = {
    "num_blocks": 1,
    "num_self_attends_per_block": 16,
    "self_attention_widening_factor": 4,
    "cross_attention_widening_factor": 1,
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


def _flow(
    stem: dict[str, Any],
    position: dict[str, Any],
    *,
    upsample: bool = False,
    num_latents: int = 2048,
    depth: int = 24,
) -> PerceiverIOConfig:
    separate = len(position["max_resolution"]) == 3
    upsampling = {"kind": "convex_upsampling", "factor": 4, "channels": 64}
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
        preprocessor={"kind": "grid", "stem": stem, "position": position},
        output_query={"kind": "input", "first_frame": True} if separate else {"kind": "input"},
        postprocessor={**(upsampling if upsample else {"kind": "flow"}), "rescale_factor": 100.0},
    )


def _patches(in_channels: int, frames: int = 1) -> dict[str, Any]:
    return {"kind": "patches", "in_channels": in_channels, "temporal_downsample": frames, "project": 64}


def _flow_conv(frames: int = 1) -> dict[str, Any]:
    return {"kind": "conv", "in_channels": 3, "channels": 64, "temporal_downsample": frames, "exact_sizes": True}


def _positions(*max_resolution: int) -> dict[str, Any]:
    return {"kind": "fourier", "num_bands": 64, "max_resolution": list(max_resolution)}


def _autoencoder(*, num_latents: int, label_weight: float = 0.0001) -> PerceiverIOConfig:
    config = multimodal_autoencoder()
    config.num_latents = num_latents
    config.preprocessor["mask_probs"] = {"image": 0.0, "audio": 0.0, "label": 0.5}
    config.preprocessor["masked_at_inference"] = ["label"]
    training = {
        "losses": {"image": "l1", "audio": "l1", "label": "cross_entropy"},
        "loss_weights": {"image": 0.03, "audio": 1.0, "label": label_weight},
        "num_loss_points": {"image": 512, "audio": 512},
    }
    config.postprocessor = {**(config.postprocessor or {}), **training}
    return config


_AVERAGE: dict[str, Any] = {"output_query": None, "postprocessor": {"kind": "average"}}


def _averaged(config: PerceiverIOConfig) -> PerceiverIOConfig:
    config.output_query, config.postprocessor = _AVERAGE["output_query"], _AVERAGE["postprocessor"]
    return config


def _one_modality(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "multimodal", "min_padding_size": 0, "modalities": {name: spec}}


_TWO_READS: dict[str, Any] = {
    **_AVERAGE,
    "num_blocks": 2,
    "num_self_attends_per_block": 8,
    "cross_attend_before_blocks": [0, 1],
    "cross_attend_sharing": "none",
    "block_sharing": "none",
}


def _audioset(audio: dict[str, Any], *, dropout: dict[str, float] | None = None, **changes: Any) -> PerceiverIOConfig:
    """Sound and 32 frames of 224x224 in patches of 2x8x8; 30 % of the videos are dropped in training (P1 4.2)."""
    fields: dict[str, Any] = {
        "num_blocks": 1,
        "num_self_attends_per_block": 12,
        "num_labels": 527,
        "problem_type": "multi_label_classification",
        "preprocessor": {
            "kind": "multimodal",
            "min_padding_size": 4,
            "dropout_probs": dropout or {"image": 0.3},
            "modalities": {"audio": audio, "image": _video_patches()},
        },
    }
    return _imagenet(**{**fields, **changes})


def _alone(preprocessor: dict[str, Any]) -> PerceiverIOConfig:
    config = original_perceiver_audioset_raw()
    config.preprocessor = preprocessor
    return config


def _video_patches() -> dict[str, Any]:
    return {
        "kind": "grid",
        "stem": {"kind": "patches", "in_channels": 3, "spatial_downsample": 8, "temporal_downsample": 2},
        "position": {"kind": "fourier", "num_bands": 16, "max_resolution": [16, 28, 28]},
    }


def _sound_patches() -> dict[str, Any]:
    return {
        "kind": "grid",
        "stem": {"kind": "audio_patches", "samples_per_patch": 128},
        "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [480]},
    }


def _spectrogram() -> dict[str, Any]:
    return {
        "kind": "grid",
        "stem": {"kind": "spectrogram", "flatten": True},
        "position": {"kind": "fourier", "num_bands": 64, "max_resolution": [4800]},
    }


def _original(**changes: Any) -> PerceiverIOConfig:
    fields = {"preprocessor": _pixels_fourier(), "cross_attend_before_blocks": list(range(8)), **_AVERAGE}
    return _imagenet(**{**fields, **changes})
