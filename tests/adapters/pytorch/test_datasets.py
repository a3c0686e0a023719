"""Data is found, split and served the same on every run, or refused in one clear line."""

from __future__ import annotations

import gzip
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from prunus.adapters.pytorch.array_images import ArrayImages, ArrayTrainBatches, normalised
from prunus.adapters.pytorch.batches import DataBundle, stratified_split, stratified_subset
from prunus.adapters.pytorch.datasets import FASHION_FOLDERS, LoadOptions, load_data, open_data
from prunus.adapters.pytorch.file_images import FileImages
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.core.errors import LoadError

GREY = InputSpec((1, 8, 8), (0.0,), (1.0,))
COLOUR = InputSpec((3, 16, 16), (0.5,) * 3, (0.25,) * 3, crop=1.0)


def digits(spec: InputSpec = GREY, **options: object) -> DataBundle:
    source = open_data("digits")
    assert source is not None
    return load_data(source, spec, LoadOptions(**options))  # type: ignore[arg-type]


def refusal(name: str, **options: object) -> str:
    with pytest.raises(LoadError) as caught:
        source = open_data(name)
        assert source is not None
        load_data(source, COLOUR, LoadOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gathered(batches: object) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)  # type: ignore[call-overload]
    return torch.cat(images), torch.cat(labels)


@given(
    st.lists(st.integers(0, 4), min_size=20, max_size=200).filter(
        lambda labels: all(labels.count(c) > 1 for c in set(labels))
    ),
    st.floats(0.05, 0.5),
    st.integers(0, 5),
)
def test_a_stratified_split_parts_every_class_in_the_wanted_share(
    labels: list[int], share: float, seed: int
) -> None:
    rest, held = stratified_split(labels, share, seed)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    for label in set(labels):
        count = sum(labels[i] == label for i in held)
        assert 1 <= count < labels.count(label)
        assert abs(count - share * labels.count(label)) <= 1


@given(st.integers(10, 300), st.integers(0, 5))
@example(14, 0)  # two images of the rarest class are more than its share already
def test_a_stratified_subset_has_the_wanted_size_and_shares(count: int, seed: int) -> None:
    labels = np.repeat(np.arange(5), [100, 80, 60, 40, 20])
    chosen = stratified_subset(labels, count, seed)
    assert len(chosen) == len(set(chosen)) == count
    shares = np.bincount(labels[chosen], minlength=5) - np.array([100, 80, 60, 40, 20]) * count / 300
    assert np.abs(shares).max() <= 2


def test_no_image_lies_in_two_parts() -> None:
    data = digits()
    parts = [gathered(part)[0] for part in (data.calibration, data.holdout, data.test)]
    assert [len(part) for part in parts] == [data.train.samples, data.holdout.samples, data.test.samples]
    assert sum(map(len, parts)) == 1797
    assert len({image.numpy().tobytes() for part in parts for image in part}) == 1797


def test_every_class_is_held_out_and_tested() -> None:
    data = digits()
    for part in (data.holdout, data.test):
        assert set(gathered(part)[1].tolist()) == set(range(10))


def test_folds_are_disjoint_parts_of_the_first_images() -> None:
    calibration = digits().calibration
    whole = gathered(calibration.part(100))[0]
    folds = [gathered(calibration.part(100, (k, 3)))[0] for k in range(3)]
    assert sum(map(len, folds)) == len(whole) == 100
    assert {x.numpy().tobytes() for f in folds for x in f} == {x.numpy().tobytes() for x in whole}


def test_an_epoch_depends_on_its_seed_alone() -> None:
    first, second = digits(), digits()
    list(first.train.epoch(1))
    one, other = gathered(first.train.epoch(7)), gathered(second.train.epoch(7))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[1], gathered(second.train.epoch(8))[1])


def test_an_epoch_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    list(digits().train.epoch(3))
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_shifts_and_mirrors_each_image_on_its_own() -> None:
    image = torch.zeros(1, 6, 6, dtype=torch.uint8)
    image[0, 2, 1] = 255
    data = ArrayImages(image.expand(400, 1, 6, 6).contiguous(), torch.zeros(400, dtype=torch.int64))
    spec = InputSpec((1, 6, 6), (0.0,), (1.0,))
    for flip, columns in ((False, {0, 1, 2}), (True, {0, 1, 2, 3, 4, 5})):
        (images, _), *_ = ArrayTrainBatches(data, spec, 400, flip, shift=1).epoch(0)
        at = images.flatten(1).argmax(1)
        assert set((at // 6).tolist()) == {1, 2, 3}
        assert set((at % 6).tolist()) == columns
        assert torch.equal(images.sum((1, 2, 3)), torch.ones(400))


def test_images_are_padded_a_little_or_resized_a_lot() -> None:
    images = ArrayImages(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    padded = images.fitted(InputSpec((1, 32, 32), (0.0,), (1.0,))).images
    assert padded.shape == (2, 1, 32, 32)
    assert torch.equal(padded[:, :, 2:-2, 2:-2], images.images)
    assert int(padded[:, :, :2].max()) == 0
    resized = images.fitted(InputSpec((1, 64, 64), (0.0,), (1.0,))).images
    assert torch.equal(resized, torch.full((2, 1, 64, 64), 200, dtype=torch.uint8))


def test_grey_images_are_repeated_for_a_model_that_takes_colour() -> None:
    x = normalised(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), InputSpec((3, 4, 4), (0.5,) * 3, (0.25,) * 3))
    assert torch.equal(x, torch.full((2, 3, 4, 4), 2.0))


def test_a_limit_takes_so_many_images_hold_out_included() -> None:
    data = digits(train_limit=300, batch_size=32)
    assert data.train.samples + data.holdout.samples == 300
    assert data.train.steps == data.train.samples // 32


def idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()) if path.suffix == ".gz" else head + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count, ending in (("train", 60, ".gz"), ("t10k", 20, "")):
        idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files_compressed_or_not(fashion: Path) -> None:
    source = open_data(f"fashion-mnist:{fashion}")
    assert source is not None
    assert (source.classes, source.in_chans, source.image.size) == (10, 1, (28, 28))
    data = load_data(source, InputSpec((1, 28, 28), (0.0,), (1.0,)), LoadOptions(batch_size=8))
    assert (data.train.samples, data.holdout.samples, data.test.samples) == (50, 10, 20)


def test_a_data_set_of_timm_is_found_by_name_and_kept_in_memory(fashion: Path) -> None:
    raw = fashion / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in fashion.glob("*ubyte*"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (raw / path.name.removesuffix(".gz")).write_bytes(content)
    ours, timms = open_data(f"fashion-mnist:{fashion}"), open_data(f"torch/mnist:{fashion}")
    assert ours is not None
    assert timms is not None
    spec, options = InputSpec((1, 28, 28), (0.0,), (1.0,)), LoadOptions(batch_size=8)
    for part in ("holdout", "calibration", "test"):
        one, other = (gathered(getattr(load_data(source, spec, options), part)) for source in (ours, timms))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_broken_idx_files_are_refused(fashion: Path) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    assert "damaged" in refusal(f"fashion-mnist:{fashion}")
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    idx(path, np.zeros((60, 28, 28), dtype=np.uint8))
    assert "t10k-labels-idx1-ubyte" in refusal(f"fashion-mnist:{fashion}")


def test_a_label_beyond_the_classes_is_refused(fashion: Path) -> None:
    idx(fashion / "train-labels-idx1-ubyte.gz", np.arange(60, dtype=np.uint8) % 11)
    assert "0..9, got 0..10" in refusal(f"fashion-mnist:{fashion}")


@pytest.mark.skipif(not FASHION_FOLDERS[0].is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_the_debian_package_of_fashion_mnist_is_found() -> None:
    source = open_data("fashion-mnist")
    assert source is not None
    assert source.image.mean == pytest.approx(0.286, abs=0.002)
    assert source.image.std == pytest.approx(0.353, abs=0.002)


def picture(path: Path, level: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24), level, dtype=np.uint8)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "owl")):
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.png", 80 * label + i, "L" if i == 0 else "RGB")
    return tmp_path


def test_a_folder_is_served_with_its_class_names_grey_images_among_colour(folder: Path) -> None:
    source = open_data(str(folder))
    assert source is not None
    assert source.class_names == ("cat", "dog", "owl")
    data = load_data(source, COLOUR, LoadOptions(batch_size=4, workers=0))
    images, labels = gathered(data.test)
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(images[2, 0, 0, 0], torch.tensor((80 / 255 - 0.5) / 0.25))


def test_grey_images_of_sixteen_bits_keep_their_mean(folder: Path) -> None:
    Image.fromarray(np.full((20, 24), 30_000, np.uint16)).save(folder / "val" / "cat" / "0.png")
    source = open_data(str(folder))
    assert source is not None
    images, _ = gathered(load_data(source, COLOUR, LoadOptions(batch_size=4, workers=0)).test)
    assert float(images[0].mean()) * 0.25 + 0.5 == pytest.approx(30_000 / 65_535, abs=2e-3)


@pytest.mark.parametrize(
    ("mode", "kind", "level", "expected"),
    [("I;16B", ">u2", 30_000, 30_000 / 65_535), ("I", "<i4", 30_000, 30_000 / 65_535), ("I", "<i4", 51, 0.2)],
)
def test_integers_are_brought_to_eight_bits(mode: str, kind: str, level: int, expected: float) -> None:
    image = Image.frombytes(mode, (16, 16), np.full((16, 16), level, kind).tobytes())
    pixels, _, _ = FileImages([(image, 0)], COLOUR, None)[0, 0]
    assert float(pixels.mean()) * 0.25 + 0.5 == pytest.approx(expected, abs=2e-3)


def test_batches_of_files_do_not_depend_on_the_number_of_workers(folder: Path) -> None:
    source = open_data(str(folder))
    assert source is not None
    before = torch.get_rng_state()
    epochs = [
        gathered(load_data(source, COLOUR, LoadOptions(batch_size=4, workers=w)).train.epoch(5)) for w in (0, 2)
    ]
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])
    assert torch.equal(before, torch.get_rng_state())


def test_an_unreadable_image_is_left_out_with_a_notice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = folder / "val" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = open_data(str(folder))
    assert source is not None
    data = load_data(source, COLOUR, LoadOptions(batch_size=4, workers=0))
    with caplog.at_level(logging.WARNING, "prunus.data"):
        images, _ = gathered(data.test)
    assert len(images) == 5
    assert "1.png" in caplog.text


def test_folders_that_cannot_be_used_are_refused(folder: Path) -> None:
    assert "train/ and val/" in refusal(str(folder / "train"))
    assert "fewer than one batch of 64" in refusal(str(folder), batch_size=64)
    (folder / "val" / "owl" / "0.png").unlink()
    (folder / "val" / "owl" / "1.png").unlink()
    assert "owl holds no images" in refusal(str(folder))
    (folder / "val" / "owl").rmdir()
    assert "owl is in one of them only" in refusal(str(folder))


def test_a_class_with_one_image_cannot_be_held_out(folder: Path) -> None:
    for i in range(1, 6):
        (folder / "train" / "dog" / f"{i}.png").unlink()
    assert "class 1 has 1 training image" in refusal(str(folder), batch_size=2)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i in range(3):
            picture(tmp_path / part / "cat" / f"{i}.png", i)
    assert "at least 2 are needed" in refusal(str(tmp_path), batch_size=1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./no/such/folder", "no data at './no/such/folder'"),
        ("mnst", "digits"),
        ("fashion-mnist:./nowhere", "dataset-fashion-mnist"),
        ("torch/cifar10:./nowhere", "torch/cifar10"),
    ],
)
def test_missing_data_is_refused_with_what_would_do(name: str, hint: str) -> None:
    assert hint in refusal(name)


def test_bad_options_are_refused() -> None:
    assert "few" in refusal("digits", train_limit=12)
    assert "between 0 and 1" in refusal("digits", holdout=1.0)
    assert "fewer than one batch" in refusal("digits", batch_size=5000)


def test_no_data_is_no_data() -> None:
    assert open_data("none") is None
