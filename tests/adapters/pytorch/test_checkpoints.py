"""Checkpoints fit, are adapted with a note, or are refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunus.adapters.pytorch.catalog import build
from prunus.core.errors import LoadError


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return build("prunus/resnet8", classes=10, seed=1).module.state_dict()


def saved(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, path)  # type: ignore[attr-defined]
    else:
        torch.save(content, path)
    return path


def refusal(path: Path, name: str = "prunus/resnet8") -> str:
    with pytest.raises(LoadError) as caught:
        build(name, checkpoint=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_checkpoint_is_read_from_every_allowed_kind_of_file(
    tmp_path: Path, weights: dict[str, torch.Tensor], ending: str
) -> None:
    built = build("prunus/resnet8", classes=10, checkpoint=saved(tmp_path / f"w{ending}", weights))
    assert built.has_weights
    assert built.notes == ()
    loaded = built.module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema"])
def test_wrapped_and_prefixed_weights_are_found(
    tmp_path: Path, weights: dict[str, torch.Tensor], key: str
) -> None:
    content = {
        key: {f"module.{name}": value for name, value in weights.items()},
        "epoch": 3,
        "args": Namespace(lr=0.1),
    }
    assert build("prunus/resnet8", checkpoint=saved(tmp_path / "w.pth", content)).has_weights


def test_the_classes_come_from_the_checkpoint_if_no_data_says_otherwise(tmp_path: Path) -> None:
    weights = build("prunus/resnet8", classes=23).module.state_dict()
    built = build("prunus/resnet8", checkpoint=saved(tmp_path / "w.pth", weights))
    assert built.classes == 23
    assert built.has_weights
    assert built.source.kwargs["num_classes"] == 23


def test_a_classifier_of_other_classes_is_resized_with_a_note(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    built = build("prunus/resnet8", classes=4, checkpoint=saved(tmp_path / "w.pth", weights))
    assert not built.has_weights
    assert built.classes == 4
    assert "from 10 to 4 classes" in built.notes[0]
    assert torch.equal(built.module.state_dict()["stem.0.0.weight"], weights["stem.0.0.weight"])


def test_a_colour_stem_answers_grey_images_as_it_would_answer_them_in_colour(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path / "w.pth", weights)
    colour = build("prunus/resnet8", classes=10, checkpoint=path).module
    grey = build("prunus/resnet8", classes=10, in_chans=1, checkpoint=path).module
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_tensors_under_other_names_are_taken_in_order_with_a_note(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    renamed = {f"layer_{i}": value for i, value in enumerate(weights.values())}
    counters = {name: value for name, value in weights.items() if name.endswith("num_batches_tracked")}
    renamed = {name: v for name, v in renamed.items() if v.ndim or not counters}
    built = build("prunus/resnet8", classes=10, checkpoint=saved(tmp_path / "w.pth", renamed))
    assert built.has_weights
    assert "other names" in built.notes[0]
    assert torch.equal(built.module.state_dict()["head.weight"], weights["head.weight"])


def test_a_checkpoint_of_another_model_names_the_first_mismatch(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path / "w.pth", weights)
    assert "stages.0.1.first.0.weight" in refusal(path, "prunus/resnet14")
    narrow = build("prunus/resnet8", kwargs={"widths": [8, 16, 32]}).module.state_dict()
    message = refusal(saved(tmp_path / "n.pth", narrow))
    assert "stem.0.0.weight has shape (8, 3, 3, 3) in it, (16, 3, 3, 3) in the model" in message
    assert "the model has no" in refusal(saved(tmp_path / "e.pth", {**weights, "extra": torch.ones(2)}))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    broken = {**weights, "head.bias": torch.full((10,), torch.nan)}
    assert "head.bias holds NaN or infinity" in refusal(saved(tmp_path / "w.safetensors", broken))


class Stranger:
    """A class that weights_only does not know."""


def test_files_that_are_no_weights_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "missing.pth")
    (folder := tmp_path / "folder").mkdir()
    assert refusal(folder).endswith("is a folder; give a file")
    save_file(weights, folder / "model.safetensors")
    assert f"such as {folder / 'model.safetensors'}" in refusal(folder)
    (tmp_path / "w.onnx").write_bytes(b"0")
    assert "unknown ending" in refusal(tmp_path / "w.onnx")
    for content in (b"hello", b"", b"e", b"s.", b"X\x02\x00\x00\x00\xff\xff."):
        (tmp_path / "junk.pth").write_bytes(content)
        assert "junk.pth" in refusal(tmp_path / "junk.pth")
    (tmp_path / "junk.pth").write_bytes(b"hello")
    assert "cannot be read, it is damaged or no file of torch.save (KeyError" in refusal(tmp_path / "junk.pth")
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(b"neither one nor the other")
        refusal(tmp_path / name)
    assert "could run code" in refusal(saved(tmp_path / "p.pth", {"state_dict": weights, "args": Stranger()}))
    assert "no weights" in refusal(saved(tmp_path / "n.pth", {"epoch": 1}))
    assert "not a dictionary" in refusal(saved(tmp_path / "l.pth", [1, 2]))


def test_a_truncated_file_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for ending in (".safetensors", ".pth"):
        path = saved(tmp_path / f"w{ending}", weights)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refusal(path)
