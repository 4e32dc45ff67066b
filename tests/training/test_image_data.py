"""Pictures from folders, data sets and arrays, of any mode; what is wrong with them is told before a run."""

import types

import numpy as np
import pytest
from PIL import Image

from hf_perceiver.training import image_data
from hf_perceiver.training.image_data import (
    Pictures,
    check_pictures,
    in_order,
    made_up_pictures,
    read_digits,
    read_folder,
    read_named,
    to_rgb,
)
from hf_perceiver.training.train_digits import load_digits


def write(path, level=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, 0, 0)).save(path, **options)


def levels(data):
    return [int(np.asarray(data[i]["image"])[0, 0, 0]) for i in range(len(data))]


# --- modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_rgb_of_transformers_pipelines(mode):
    from transformers.image_utils import load_image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)
    assert to_rgb(picture).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), np.asarray(load_image(picture)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_are_scaled_not_cut_off(dtype):
    """Pillow's own conversion would make everything above 255 white."""
    picture = Image.fromarray(np.array([[0, 257 * 10, 65535]], dtype))
    assert np.asarray(to_rgb(picture))[0].tolist() == [[0] * 3, [10] * 3, [255] * 3]


def test_a_picture_taken_sideways_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    write(tmp_path / "a.jpg", exif=exif)
    assert image_data.read_picture(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 4, 3)), "a PIL image, not ndarray"),
        (Image.new("F", (2, 2)), "no known range"),
        (Image.fromarray(np.array([[-1]], np.int32)), "holds 0..65535, not -1..-1"),
    ],
)
def test_what_is_no_picture_of_known_range_is_refused(picture, told):
    with pytest.raises(ValueError, match=told):
        to_rgb(picture)


# --- folders


def test_a_folder_is_read_by_class_at_any_depth(tmp_path):
    for part, names in (("train", "bab"), ("val", "ab")):
        for index, name in enumerate(names):
            write(tmp_path / part / name / ("deep" if index else "") / f"{index}.png", level=index)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not a picture")
    train, held_out = read_folder(tmp_path)
    assert train.classes == held_out.classes == ["a", "b"]
    assert train.labels == [0, 1, 1] and levels(train) == [1, 0, 2]
    assert held_out.labels == [0, 1] and levels(held_out) == [0, 1]


def test_of_one_folder_a_share_of_every_class_is_held_out_and_the_same_again(tmp_path):
    for name, count in (("few", 4), ("many", 10)):
        for index in range(count):
            write(tmp_path / name / f"{index}.png", level=index)
    train, held_out = read_folder(tmp_path, held_out_share=0.25, seed=3)
    assert held_out.labels == [0, 1, 1] and len(train) == 11
    assert not set(train.items) & set(held_out.items)
    assert read_folder(tmp_path, held_out_share=0.25, seed=3)[1].items == held_out.items
    assert read_folder(tmp_path, held_out_share=0.25, seed=4)[1].items != held_out.items


def test_files_that_are_no_pictures_are_named_and_left_out_up_to_a_share(tmp_path, capsys):
    for name in "ab":
        for index in range(5):
            write(tmp_path / name / f"{index}.png")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"no picture")
    train, held_out = read_folder(tmp_path, held_out_share=0.2, max_unreadable_share=0.2)
    assert len(train) + len(held_out) == 10
    error = capsys.readouterr().err
    assert "broken.jpg" in error and "1 of " in error and "left out" in error
    with pytest.raises(
        ValueError, match=r"1 of \d+ files cannot be read as pictures: .*broken.jpg.*max_unreadable_share"
    ):
        read_folder(tmp_path, held_out_share=0.2, max_unreadable_share=0.01)


def test_a_picture_that_breaks_off_is_named_when_it_is_read(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    assert not image_data.unreadable([tmp_path / "half.png"]), "its header is there"
    with pytest.raises(ValueError, match=r"half.png cannot be read as a picture .*resume_from_checkpoint"):
        image_data.read_picture(tmp_path / "half.png")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "holds no folders"),
        (["a/1.png", "a/2.png"], "one class, 'a'"),
        (["a/1.png", "a/2.png", "b/1.png"], "class 'b' in .* has 1 picture"),
        (["a/1.png", "a/2.png", "b/notes.txt"], "no pictures in b"),
        (["train/a/1.png", "train/b/1.png"], "none of val, validation, test"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], "only .*train has b; only .*val has c"),
        (["train/a/1.png", "val/a/1.png"], "one class, 'a'"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_told_why(tmp_path, files, told):
    for name in files:
        if name.endswith(".png"):
            write(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=told):
        read_folder(tmp_path)


def test_a_folder_that_is_not_there_and_a_share_that_is_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"held_out_share=1\.0"):
        read_folder(tmp_path, held_out_share=1.0)


# --- data sets


def test_digits_are_split_as_the_bundled_model_was_trained():
    train, held_out = read_digits()
    data = load_digits()
    assert (len(train), len(held_out)) == (1437, 360)
    np.testing.assert_array_equal(np.asarray(held_out[7]["image"]), data["test_images"][7])
    assert held_out[7]["label"] == data["test_labels"][7]


class Column(list):
    """What a `datasets` data set is to us: rows, column_names, features, columns by name."""

    column_names = ("image", "label")
    features = {"label": types.SimpleNamespace(names=["cat", "dog"])}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_a_named_data_set_gives_its_parts(monkeypatch):
    parts = {"train": Column([{"image": 0, "label": 1}]), "test": Column([{"image": 1, "label": 0}])}
    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=lambda name: parts))
    train, held_out = read_named("pets")
    assert (train, held_out) == (parts["train"], parts["test"])
    assert check_pictures(train, held_out) == ["cat", "dog"]
    parts["test"][0]["label"] = 2
    with pytest.raises(ValueError, match=r"label of the data to evaluate on is 2; its classes are 0..1"):
        check_pictures(train, held_out)
    del parts["test"]
    with pytest.raises(ValueError, match="it takes train, and validation or test"):
        read_named("pets")


def test_without_its_package_a_named_data_set_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_named("pets")


def test_made_up_pictures_are_the_same_again_and_of_every_class():
    train, held_out = made_up_pictures()
    assert set(train.labels) == set(held_out.labels) == {0, 1, 2}
    assert np.array_equal(np.asarray(train[3]["image"]), np.asarray(made_up_pictures()[0][3]["image"]))


def some(labels, classes):
    return Pictures([Image.new("L", (2, 2))] * len(labels), labels, classes, Image.Image.copy)


@pytest.mark.parametrize(
    ("train", "held_out", "told"),
    [
        (some([], "ab"), None, "to train on is empty"),
        (some([0], "ab"), some([], "ab"), "to evaluate on is empty"),
        (some([0], "a"), None, "one class, 'a'"),
        (some([0], "aa"), None, "two classes have one name: a"),
        (some([0, 2], "ab"), None, r"a label of the data to train on is 2; its classes are 0..1"),
        (some([0], "ab"), some([0], "ba"), "classes to train on and to evaluate on differ"),
        ([{"image": None, "label": 0}], None, "list does not know its classes"),
    ],
)
def test_data_that_cannot_be_learned_is_told_why(train, held_out, told):
    with pytest.raises(ValueError, match=told):
        check_pictures(train, held_out)


def test_labels_follow_the_order_that_is_asked_for():
    data = some([0, 1, 2], ["a", "b", "c"])
    turned = in_order(data, ["c", "a", "b"])
    assert [turned[i]["label"] for i in range(len(turned))] == [1, 2, 0] and turned.classes == ["c", "a", "b"]
    assert in_order(data, ["x", "y", "z"]) is data
