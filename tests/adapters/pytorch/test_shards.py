"""A stream of images in tar files is the same stream whoever reads it; data of Hugging Face is read by timm."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunus.adapters.pytorch.augmentation import Augmentation
from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.datasets import LoadOptions, ShardSource, load_data, open_data
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.core.errors import ConfigError, LoadError

pytest.importorskip("webdataset")
SPEC = InputSpec((3, 16, 16), (0.5,) * 3, (0.25,) * 3, crop=1.0)


def picture(number: int) -> Image.Image:
    """Its first colour channel says its number, the others its class."""
    return Image.fromarray(np.full((16, 16, 3), (number, 60 * (number % 4), 0), dtype=np.uint8))


def write_shard(path: Path, numbers: range, ending: str = "png") -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = io.BytesIO()
            picture(number).save(content, "png")
            files = {ending: content.getvalue(), "cls": str(number % 4).encode(), "mask.png": b"not an image"}
            for kind, data in files.items():
                member = tarfile.TarInfo(f"some.folder/{number:04}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_shards(folder: Path) -> Path:
    """4 shards of 12 to train on, the last of them held out, and one of 10 to test on."""
    folder.mkdir(exist_ok=True)
    for shard in range(4):
        ending = ("png", "jpeg", "webp", "PNG")[shard]  # a name is no promise: the content is PNG in all of them
        write_shard(folder / f"train-{shard}.tar", range(12 * shard, 12 * shard + 12), ending)
    write_shard(folder / "val-0.tar", range(100, 110))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def opened(folder: Path, **options: object) -> DataBundle:
    source = open_data(f"wds/some:{folder}", 4)
    assert isinstance(source, ShardSource)
    settings = {"batch_size": 8, "steps_per_epoch": 4, **options}
    return load_data(source, SPEC, LoadOptions(**settings))  # type: ignore[arg-type]


def numbers(images: torch.Tensor) -> list[int]:
    """Of unaugmented images."""
    return [round(float(image[0].mean() * 0.25 + 0.5) * 255) for image in images]


def test_a_stream_is_split_by_shards_and_tested_whole(folder: Path) -> None:
    data = opened(folder)
    held = [n for images, _ in data.holdout for n in numbers(images)]
    assert held == list(range(36, 48))
    assert data.holdout.samples == 12 and data.test.samples == 10
    assert [n for images, _ in data.test for n in numbers(images)] == list(range(100, 110))
    known = [n for images, _ in data.calibration for n in numbers(images)]
    assert len(known) == data.calibration.samples == 32
    assert set(known) <= set(range(36)) and known != sorted(known)
    assert all(
        label == n % 4 for images, labels in data.test for n, label in zip(numbers(images), labels, strict=True)
    )


def test_an_epoch_of_a_stream_depends_on_its_seed_alone_and_not_on_workers(folder: Path) -> None:
    first = [(images, labels) for images, labels in opened(folder).train.epoch(7)]
    again = [(images, labels) for images, labels in opened(folder, workers=2).train.epoch(7)]
    assert len(first) == len(again) == 4
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    other_seed = next(iter(opened(folder).train.epoch(8)))
    assert not torch.equal(first[0][0], other_seed[0])


def test_two_processes_share_each_batch_of_a_stream_between_them(folder: Path) -> None:
    train, parts = opened(folder).train, []
    for rank in range(2):
        parts.append(list(train.share(rank, 2).epoch(3)))
    for whole, one, two in zip(train.epoch(3), *parts, strict=True):
        assert len(one[1]) == len(two[1]) == 4
        together = sorted(image.sum().item() for image in torch.cat([one[0], two[0]]))
        assert together == sorted(image.sum().item() for image in whole[0])


def test_parts_and_folds_of_a_stream_are_what_they_are_of_any_data(folder: Path) -> None:
    calibration = opened(folder).calibration
    whole = [n for images, _ in calibration for n in numbers(images)]
    folds = [[n for images, _ in calibration.part(20, (k, 2)) for n in numbers(images)] for k in range(2)]
    assert folds == [whole[:20:2], whole[1:20:2]]
    shares = [sorted(n for images, _ in calibration.share(k, 2) for n in numbers(images)) for k in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(whole)


def test_a_stream_without_a_length_wants_steps_per_epoch_and_classes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not say how many images it has; pass --steps-per-epoch"):
        opened(folder, steps_per_epoch=None)
    with pytest.raises(ConfigError, match="--num-classes"):
        open_data(f"wds/some:{folder}")
    with pytest.raises(ConfigError, match=r"--steps-per-epoch is for streams"):
        load_data(open_data("digits"), SPEC, LoadOptions(steps_per_epoch=3))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--num-classes is for streams"):
        open_data("digits", 10)


def test_a_stream_that_says_its_length_needs_nothing(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "told")
    names = [f"train-{i}.tar" for i in range(4)]
    train = {"name": "train", "filenames": names, "shard_lengths": [12] * 4, "num_samples": 48}
    test = {"name": "validation", "filenames": ["val-0.tar"], "shard_lengths": [10], "num_samples": 10}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": train, "validation": test}}))
    data = opened(folder, steps_per_epoch=None)
    assert (data.train.steps, data.holdout.samples, data.test.samples) == (36 // 8, 12, 10)
    assert len(list(data.train.epoch(0))) == 4


def test_a_label_that_is_no_class_is_refused_also_from_a_worker(folder: Path) -> None:
    source = open_data(f"wds/some:{folder}", 3)
    assert source is not None
    for workers in (0, 1):
        data = load_data(source, SPEC, LoadOptions(8, workers=workers, steps_per_epoch=2))
        with pytest.raises(LoadError, match=r"^[^\n]*labels must lie in 0\.\.2, got 3$"):
            list(data.train.epoch(0))


def test_a_folder_that_is_no_set_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no shards train\*\.tar"):
        open_data(f"wds/some:{tmp_path}", 4)
    write_shard(tmp_path / "train.tar", range(4))
    with pytest.raises(LoadError, match="at least 2"):
        open_data(f"wds/some:{tmp_path}", 4)
    with pytest.raises(LoadError, match="no folder '/nowhere'"):
        open_data("wds/some:/nowhere", 4)
    with pytest.raises(LoadError, match=r"^wds/some names no folder; .* wds/NAME:DIR"):
        open_data("wds/some", 4)
    (tmp_path / "train2.tar").write_bytes(b"x" * 700)
    (tmp_path / "val.tar").write_bytes(b"x" * 700)
    with pytest.raises(LoadError, match=r"train2\.tar cannot be read"):
        opened(tmp_path)
    write_shard(tmp_path / "train2.tar", range(4))
    write_shard(tmp_path / "val.tar", range(0))
    with pytest.raises(LoadError, match=r"no image in val\.tar"):
        opened(tmp_path)
    for wrong in ("{", "[]", '{"splits": {"train": {"filenames": ["train.tar"]}}}'):
        (tmp_path / "_info.json").write_text(wrong)
        with pytest.raises(LoadError, match=r"_info\.json is not of timm's form"):
            open_data(f"wds/some:{tmp_path}", 4)


def test_an_image_that_cannot_be_read_is_left_out(folder: Path, tmp_path: Path) -> None:
    broken = write_shards(tmp_path / "broken")
    content = (broken / "val-0.tar").read_bytes()
    (broken / "val-0.tar").write_bytes(content.replace(b"IHDR", b"XXXX", 1))
    data = opened(broken)
    assert [n for images, _ in data.test for n in numbers(images)] == list(range(101, 110))


def test_erasing_and_policies_are_for_training_images_alone(folder: Path) -> None:
    plain = opened(folder)
    augmented = opened(folder, augmentation=Augmentation("rand-m9-n2", 1.0))
    for part in ("holdout", "calibration", "test"):
        for one, other in zip(getattr(plain, part), getattr(augmented, part), strict=True):
            assert torch.equal(one[0], other[0])
    assert not torch.equal(next(iter(plain.train.epoch(0)))[0], next(iter(augmented.train.epoch(0)))[0])


def test_a_data_set_of_hugging_face_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    for split, count in (("train", 40), ("test", 8)):
        rows = {"image": [picture(i) for i in range(count)], "label": [i % 4 for i in range(count)]}
        made = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        made.to_parquet(tmp_path / "pictures" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(LoadError, match="no folder '/nowhere'"):
        open_data("hfds//nowhere")
    source = open_data(f"hfds/{tmp_path / 'pictures'}:{tmp_path / 'cache'}")
    assert source is not None
    assert source.class_names == ("a", "b", "c", "d")
    data = load_data(source, SPEC, LoadOptions(8, augmentation=Augmentation("rand-m5-n1", 0.5)))
    assert (data.train.samples, data.holdout.samples, data.test.samples) == (36, 4, 8)
    assert [n for images, _ in data.test for n in numbers(images)] == list(range(8))
    one, other = (next(iter(data.train.epoch(5))) for _ in range(2))
    assert torch.equal(one[0], other[0])
