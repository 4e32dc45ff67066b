import math

import pytest
import torch

from hf_perceiver.registry import STEMS
from hf_perceiver.stems import same_padding, space_to_depth


def stem(kind, **options):
    """A stem with drawn weights, in evaluation mode."""
    module = STEMS.build({"kind": kind, **options})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


# One of each kind: options, an input of odd sizes, the grid it gives.
EVERY = {
    "pixels": ({"in_channels": 2}, (3, 2, 5, 7), (5, 7)),
    "pixels, video": (
        {"in_channels": 2, "spatial_downsample": 2, "temporal_downsample": 3},
        (3, 4, 2, 5, 7),
        (2, 3, 4),
    ),
    "conv": ({"in_channels": 2, "channels": 4}, (3, 2, 9, 15), (3, 4)),
    "conv, video": ({"in_channels": 2, "channels": 4}, (3, 2, 2, 9, 15), (2, 3, 4)),
    "conv, frame pair": ({"in_channels": 2, "channels": 4, "temporal_downsample": 2}, (3, 2, 2, 9, 15), (3, 4)),
    "conv, two pairs": ({"in_channels": 2, "channels": 4, "temporal_downsample": 2}, (3, 4, 2, 9, 15), (2, 3, 4)),
    "conv1x1": ({"in_channels": 2, "channels": 4, "spatial_downsample": 2}, (3, 2, 5, 7), (3, 4)),
    "conv1x1, video": ({"in_channels": 2, "channels": 4}, (3, 2, 2, 5, 7), (2, 5, 7)),
    "patches": ({"in_channels": 2, "spatial_downsample": 2}, (3, 2, 4, 6), (2, 3)),
    "patches, video": (
        {"in_channels": 2, "spatial_downsample": 2, "temporal_downsample": 2},
        (3, 4, 2, 4, 6),
        (2, 2, 3),
    ),
    "patches, frame pair": ({"in_channels": 2, "temporal_downsample": 2, "project": 5}, (3, 2, 2, 3, 5), (3, 5)),
    "patches, windows": (
        {"in_channels": 2, "spatial_downsample": 2, "kernel_size": 5, "project": 5, "normalize": True},
        (3, 2, 2, 4, 6),
        (2, 2, 3),
    ),
    "permuted": ({"stem": {"kind": "pixels", "in_channels": 2}, "grid": [5, 7]}, (3, 2, 5, 7), (5, 7)),
    "permuted, video": ({"stem": {"kind": "conv1x1", "in_channels": 2}, "grid": [5, 7]}, (3, 2, 2, 5, 7), (2, 5, 7)),
    "audio_patches": ({"samples_per_patch": 4}, (3, 12, 1), (3,)),
    "values": ({"channels": 5}, (3, 2, 3, 5), (2, 3)),
    "values, sequence": ({"channels": 5}, (3, 7, 5), (7,)),
}


@pytest.mark.parametrize("name", EVERY)
def test_features_stand_on_a_grid_channels_last(name):
    options, shape, grid = EVERY[name]
    module = stem(name.split(",")[0], **options)
    assert module(torch.randn(shape)).shape == (shape[0], *grid, module.channels)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_gives_what_its_items_give(name):
    options, shape, _ = EVERY[name]
    module, x = stem(name.split(",")[0], **options), torch.randn(shape)
    alone = torch.cat([module(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-5)


# --- pixels


def test_pixels_are_moved_not_changed():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(stem("pixels")(x), x.permute(0, 2, 3, 1))


def test_strides_act_on_height_width_and_time():
    """transformers' built-in strides over batch and channels instead."""
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(stem("pixels", spatial_downsample=3)(x), x[:, :, ::3, ::3].permute(0, 2, 3, 1))
    video = torch.randn(2, 5, 3, 5, 7)
    got = stem("pixels", spatial_downsample=2, temporal_downsample=3)(video)
    assert torch.equal(got, video[:, ::3, :, ::2, ::2].permute(0, 1, 3, 4, 2))


# --- conv


@pytest.mark.parametrize(
    ("size", "after_conv", "after_pool"), [(224, 112, 56), (223, 112, 56), (15, 8, 4), (10, 5, 3), (1, 1, 1)]
)
def test_same_padding_rounds_sizes_up(size, after_conv, after_pool):
    """DeepMind's 224 -> 112 -> 56; each step gives ceil(size / 2)."""
    assert (after_conv, after_pool) == (math.ceil(size / 2), math.ceil(math.ceil(size / 2) / 2))
    x = torch.randn(1, 1, size, 8)
    assert stem("conv", in_channels=1, channels=2)(x).shape == (1, after_pool, 2, 2)


@pytest.mark.parametrize(
    ("size", "kernel", "want"), [(224, 7, (2, 3)), (223, 7, (3, 3)), (112, 3, (0, 1)), (111, 3, (1, 1)), (1, 7, (3, 3))]
)
def test_the_larger_half_of_the_padding_goes_after(size, kernel, want):
    # The figures of tests/reference: (2, 3) at even sizes and (3, 3) at odd ones, for the pool (0, 1) and (1, 1).
    assert same_padding(size, kernel, stride=2) == want


def at(image, row, column):
    height, width = image.shape[-2:]
    return image[..., row, column] if 0 <= row < height and 0 <= column < width else torch.zeros(image.shape[:-2])


def test_the_conv_stem_computes_what_its_parts_say():
    """Window by window: 7x7 kernel every second pixel, BatchNorm's running statistics, relu, 3x3 maximum."""
    module = stem("conv", in_channels=2, channels=3)
    norm = module.norms[0]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(1, 2, 6, 5)
    kernel = module.convs[0].weight
    rows, columns = 3, 3
    top, left = 2, 3  # (2, 3) rows before and after at the even height, (3, 3) columns at the odd width
    features = torch.zeros(1, 3, rows, columns)
    for r in range(rows):
        for c in range(columns):
            for i in range(7):
                for j in range(7):
                    features[..., r, c] += at(x, 2 * r - top + i, 2 * c - left + j) @ kernel[:, :, i, j].T
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    features = ((features - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).relu()
    want = torch.zeros(1, 3, 2, 2)
    for r in range(2):
        for c in range(2):
            window = [at(features, 2 * r - 1 + i, 2 * c - 1 + j) for i in range(3) for j in range(3)]
            want[..., r, c] = torch.stack(window).amax(0)
    torch.testing.assert_close(module(x), want.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_the_builtin_padding_gives_55():
    assert stem("conv", padding="builtin", channels=2)(torch.randn(1, 3, 224, 224)).shape == (1, 55, 55, 2)


def test_every_layer_of_the_conv_stem_makes_sides_four_times_smaller():
    module = stem("conv", channels=4, num_layers=2)
    assert [c.in_channels for c in module.convs] == [3, 4]
    assert module(torch.randn(1, 3, 64, 33)).shape == (1, 4, 3, 4)


def test_batchnorm_can_be_left_out():
    with_norm, without = stem("conv", channels=4), stem("conv", channels=4, use_batchnorm=False)
    assert {name.split(".")[0] for name, _ in with_norm.named_parameters()} == {"convs", "norms"}
    assert {name.split(".")[0] for name, _ in without.named_parameters()} == {"convs"}


def test_batchnorm_learns_its_statistics_in_training_only():
    module, x = stem("conv", channels=4), torch.randn(2, 3, 8, 8) + 5
    before = module.norms[0].running_mean.clone()
    module(x)
    assert torch.equal(module.norms[0].running_mean, before)
    module.train()(x)
    assert not torch.equal(module.norms[0].running_mean, before)


def test_frames_of_a_video_are_convolved_one_by_one():
    module, video = stem("conv", in_channels=2, channels=4), torch.randn(2, 3, 2, 9, 10)
    alone = torch.stack([module(video[:, t]) for t in range(3)], dim=1)
    torch.testing.assert_close(module(video), alone, rtol=0, atol=1e-5)


def test_frames_can_be_convolved_together():
    """As one image of the channels of both, the first frame's before the second's."""
    pair = stem("conv", in_channels=3, channels=4, temporal_downsample=2)
    both = stem("conv", in_channels=6, channels=4)
    both.load_state_dict(pair.state_dict())
    video = torch.randn(2, 2, 3, 9, 10)
    assert torch.equal(pair(video), both(torch.cat([video[:, 0], video[:, 1]], dim=1)))


def test_exact_sizes_are_multiples_of_the_whole_stride():
    module = stem("conv", channels=4, exact_sizes=True)
    assert module(torch.randn(1, 3, 8, 12)).shape == (1, 2, 3, 4)
    for height, width, padded in ((8, 13, "8x16"), (9, 12, "12x12"), (1, 2, "4x4")):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels are no multiples of 4; pad .* to {padded}"):
            module(torch.randn(1, 3, height, width))
    with pytest.raises(ValueError, match=r"8x20 pixels are no multiples of 16; pad .* to 16x32"):
        stem("conv", channels=4, num_layers=2, exact_sizes=True)(torch.randn(1, 3, 8, 20))


# --- permuted


def test_every_image_and_channel_is_permuted_alike_before_the_stem():
    module, x = stem("permuted", stem={"kind": "pixels"}, grid=[4, 5], seed=3), torch.randn(2, 3, 4, 5)
    got = module(x).flatten(1, 2)  # (B, 20, 3)
    assert torch.equal(got, x.flatten(2).transpose(1, 2)[:, module.permutation])
    assert sorted(module.permutation.tolist()) == list(range(20)) and not torch.equal(got, got.sort(dim=1).values)


def test_the_permutation_is_kept_with_the_weights_and_the_same_for_its_seed():
    """Kept, so that no other version of torch can draw another one."""
    spec = {"stem": {"kind": "pixels"}, "grid": [4, 5]}
    module, other = stem("permuted", **spec, seed=3), stem("permuted", **spec, seed=4)
    assert torch.equal(stem("permuted", **spec, seed=3).permutation, module.permutation)
    assert not torch.equal(other.permutation, module.permutation)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.permutation, module.permutation)


def test_pixels_are_permuted_on_their_own_grid_only():
    with pytest.raises(ValueError, match=r"permuted on a grid of 4x5, and the input is \(1, 3, 5, 4\)"):
        stem("permuted", stem={"kind": "pixels"}, grid=[4, 5])(torch.randn(1, 3, 5, 4))


# --- conv1x1


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_1x1_convolution_is_one(stride):
    module, x = stem("conv1x1", channels=4, spatial_downsample=stride), torch.randn(2, 3, 5, 7)
    want = torch.nn.functional.conv2d(x, module.conv.weight, module.conv.bias, stride=stride)
    torch.testing.assert_close(module(x), want.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


# --- patches


def test_patches_hold_time_height_width_channel_in_this_order():
    x = torch.randn(2, 4, 3, 6, 4)  # (B, T, C, H, W)
    got = stem("patches", spatial_downsample=2, temporal_downsample=2)(x)
    for t in range(2):
        for h in range(3):
            for w in range(2):
                offsets = [(dt, dh, dw) for dt in range(2) for dh in range(2) for dw in range(2)]
                pixels = [x[:, 2 * t + dt, :, 2 * h + dh, 2 * w + dw] for dt, dh, dw in offsets]
                assert torch.equal(got[:, t, h, w], torch.cat(pixels, dim=1))


def test_a_frame_pair_becomes_one_image():
    """The flow model: 27 channels of each of two frames, 54 in a row."""
    x = torch.randn(2, 2, 27, 4, 5)
    got = stem("patches", in_channels=27, temporal_downsample=2)(x)
    assert torch.equal(got, torch.cat([x[:, 0], x[:, 1]], dim=1).permute(0, 2, 3, 1))


def test_patches_can_be_projected():
    module, x = stem("patches", spatial_downsample=2, project=5), torch.randn(2, 3, 4, 6)
    patches = stem("patches", spatial_downsample=2)(x)
    assert module.channels == 5
    torch.testing.assert_close(module(x), patches @ module.linear.weight.T + module.linear.bias)


@pytest.mark.parametrize(("kernel_size", "stride"), [(6, 2), (5, 2), (2, 2), (3, 1)])
def test_windows_are_torchs_unfold_of_each_frame_by_one_linear_then_frames_are_merged(kernel_size, stride):
    module = stem(
        "patches", spatial_downsample=stride, temporal_downsample=2, project=5, kernel_size=kernel_size, normalize=True
    )
    x = torch.randn(3, 4, 3, 6, 8)  # (B, T, C, H, W)
    before, after = (kernel_size - stride) // 2, (kernel_size - stride + 1) // 2
    padded = torch.nn.functional.pad(x.flatten(0, 1), (before, after, before, after))
    columns = torch.nn.functional.unfold(padded, kernel_size, stride=stride)  # (B * T, C * k * k, places)
    pixels = columns.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # channels last, as in patches
    want = module.norm(module.linear(pixels))
    want = want.unflatten(1, (6 // stride, 8 // stride)).unflatten(0, (3, 2, 2))  # (B, T / 2, 2, h, w, 5)
    got = module(x)
    assert module.channels == 10 and got.shape == (3, 2, 6 // stride, 8 // stride, 10)
    # The norm divides by deviations of about 0.5; what is left is float32's.
    torch.testing.assert_close(got, want.permute(0, 1, 3, 4, 2, 5).flatten(4), rtol=1e-5, atol=1e-5)


def test_windows_of_an_image_and_of_a_frame_pair_stand_on_its_grid():
    module = stem("patches", spatial_downsample=4, project=7, kernel_size=10)
    assert module(torch.randn(2, 3, 8, 12)).shape == (2, 2, 3, 7)
    pair = stem("patches", spatial_downsample=4, temporal_downsample=2, project=7, kernel_size=10)
    assert pair(torch.randn(2, 2, 3, 8, 12)).shape == (2, 2, 3, 14)
    with pytest.raises(ValueError, match="a grid of 2x8x10 does not divide into patches of 2x4x4"):
        pair(torch.randn(2, 2, 3, 8, 10))


def test_windows_as_large_as_patches_are_patches():
    module, windows = (
        stem("patches", spatial_downsample=2, project=5, **options) for options in ({}, {"kernel_size": 2})
    )
    windows.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(windows(x), module(x))


def test_without_windows_a_patch_stem_has_the_weights_it_had():
    plain = stem("patches", spatial_downsample=2, temporal_downsample=2, project=5)
    assert {name: tuple(value.shape) for name, value in plain.state_dict().items()} == {
        "linear.weight": (5, 24),
        "linear.bias": (5,),
    }
    normed = stem("patches", spatial_downsample=2, project=5, normalize=True)
    assert set(normed.state_dict()) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 5, 8), ["grid of 5x8", "patches of 4x4", "4x8"]),
        ((1, 3, 3, 8), ["grid of 3x8", "4x8"]),
        ((1, 3, 3, 4, 8), ["grid of 3x4x8", "patches of 2x4x4", "2x4x8"]),
    ],
)
def test_sizes_that_patches_do_not_divide_are_told_the_nearest(shape, words):
    module = stem("patches", spatial_downsample=4, temporal_downsample=2 if len(shape) == 5 else 1)
    with pytest.raises(ValueError) as error:
        module(torch.randn(shape))
    assert all(word in str(error.value) for word in words)


def test_space_to_depth_can_be_undone():
    x = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = space_to_depth(x, (2, 3))
    assert patches.shape == (2, 2, 2, 18)
    back = patches.reshape(2, 2, 2, 2, 3, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 4, 6, 3)
    assert torch.equal(back, x)


# --- sound


def test_sound_is_cut_into_patches_in_order():
    x = torch.arange(24.0).reshape(2, 12, 1)
    module = stem("audio_patches", samples_per_patch=4)
    assert torch.equal(module(x), x.reshape(2, 3, 4))
    assert torch.equal(module(x[..., 0]), x.reshape(2, 3, 4))


@pytest.mark.parametrize(("samples", "more"), [(10, 2), (1, 3), (0, 4)])
def test_samples_that_do_not_fill_patches_are_told_how_many_are_missing(samples, more):
    with pytest.raises(
        ValueError, match=f"{samples} samples are not a whole number of patches of 4; pad with {more} more"
    ):
        stem("audio_patches", samples_per_patch=4)(torch.zeros(1, samples, 1))


# --- what is refused


@pytest.mark.parametrize(
    ("kind", "options", "shape", "message"),
    [
        (
            "pixels",
            {},
            (1, 5, 6, 3),
            r"images are \(batch, 3, height, width\).*; channels come before height and width",
        ),
        ("pixels", {}, (1, 4, 5, 6), r"not \(1, 4, 5, 6\)"),
        ("pixels", {}, (3, 5, 6), r"not \(3, 5, 6\)"),
        ("conv", {}, (1, 1, 1, 3, 5, 6), "images are .batch, 3"),
        ("conv", {"temporal_downsample": 2}, (1, 3, 5, 6), "temporal_downsample=2 needs a video, not an image"),
        ("conv", {"temporal_downsample": 2}, (1, 3, 3, 5, 6), "a grid of 3x5x6 does not divide into patches of 2x1x1"),
        ("conv1x1", {}, (1, 2, 5, 6), "images are .batch, 3"),
        ("pixels", {"temporal_downsample": 2}, (1, 3, 5, 6), "temporal_downsample=2 needs a video, not an image"),
        ("patches", {"temporal_downsample": 2}, (1, 3, 4, 4), "temporal_downsample=2 needs a video, not an image"),
        ("audio_patches", {}, (96,), r"sound is \(batch, samples, channels\), not \(96,\)"),
        ("values", {"channels": 4}, (2, 3, 5), r"values are \(batch, ..., 4\), not \(2, 3, 5\)"),
        ("values", {"channels": 4}, (2, 4), r"values are \(batch, ..., 4\), not \(2, 4\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(kind, options, shape, message):
    with pytest.raises(ValueError, match=message):
        stem(kind, **options)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "pixels",
            {"spatial_downsample": 0},
            "option 'spatial_downsample' of stem kind 'pixels' must be at least 1, not 0",
        ),
        (
            "patches",
            {"temporal_downsample": -1},
            "'temporal_downsample' of stem kind 'patches' must be at least 1, not -1",
        ),
        ("conv", {"num_layers": 0}, "'num_layers' .* must be at least 1, not 0"),
        ("conv1x1", {"channels": 0}, "'channels' .* must be at least 1, not 0"),
        ("audio_patches", {"samples_per_patch": 0}, "'samples_per_patch' .* must be at least 1, not 0"),
        ("conv", {"padding": "valid"}, "padding='valid' must be one of same, builtin"),
        ("conv", {"channels": "64"}, "option 'channels' of stem kind 'conv' must be of type int, not '64'"),
        (
            "patches",
            {"spatial_downsample": 4, "project": 8, "kernel_size": 3},
            "kernel_size=3 leaves pixels out between windows that are 4 apart; give at least spatial_downsample=4",
        ),
        ("patches", {"kernel_size": 0, "project": 8}, "'kernel_size' .* must be at least 1, not 0"),
        ("patches", {"kernel_size": 5}, "kernel_size acts on what is projected; give project"),
        ("patches", {"normalize": True}, "normalize acts on what is projected; give project"),
        ("values", {}, "stem kind 'values' needs the option 'channels'"),
        ("pixel", {}, "unknown stem kind 'pixel'; known kinds: audio_patches, conv, conv1x1"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        STEMS.build({"kind": kind, **options})
