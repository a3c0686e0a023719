"""Exported files answer like the model, in every kind of architecture, and say clearly when they cannot."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from prunus.adapters.pytorch.export import export_onnx, export_program
from prunus.adapters.pytorch.zoo import ZOO
from prunus.core.errors import MissingDependencyError, TraceError, VerificationError
from prunus.core.export import ExportReport

Export = Callable[..., ExportReport]
EXPORTS = {"onnx": export_onnx, "program": export_program}
SUFFIX = {"onnx": "onnx", "program": "pt2"}

QUICK = {
    "test_resnet": 64,
    "mobilenetv3_small_050": 64,
    "test_efficientnet": 64,
    "test_vit": 160,
    "test_convnext": 64,
}
SLOW = {
    "densenet121": 64,
    "regnetx_002": 64,
    "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224,
    "torchvision/googlenet": 64,
    "torchvision/inception_v3": 96,
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        model = torchvision.models.get_model(name.partition("/")[2], weights=None, init_weights=False)
    else:
        model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)  # a zero head would agree with everything
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.2)
    return model.eval()


def check(name: str, size: int, form: str, folder: Path) -> None:
    model = built(name)
    path = folder / f"model.{SUFFIX[form]}"
    report = EXPORTS[form](model, (torch.randn(2, 3, size, size),), path, real=(torch.rand(3, 3, size, size),))
    assert report.path == path and report.bytes == path.stat().st_size
    assert report.dynamic_batch and not report.notes
    assert {(c.inputs, c.batch) for c in report.checks} == {("random", 2), ("random", 1), ("real", 3)}
    assert all(c.scale > 0 for c in report.checks)
    assert report.max_error <= 1e-4
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("name", QUICK)
def test_an_exported_file_answers_like_the_model(name: str, form: str, tmp_path: Path) -> None:
    check(name, QUICK[name], form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("name", SLOW)
def test_an_exported_file_of_a_larger_family_answers_like_the_model(name: str, form: str, tmp_path: Path) -> None:
    check(name, SLOW[name], form, tmp_path)


@pytest.fixture
def small() -> nn.Module:
    return ZOO["resnet8"]().eval()


def test_an_onnx_file_runs_alone_at_any_batch_size_under_stable_names(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(small, (torch.randn(1, 3, 16, 16),), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(v.name, v.shape) for v in session.get_inputs()] == [("input", ["batch", 3, 16, 16])]
    assert [(v.name, v.shape) for v in session.get_outputs()] == [("output", ["batch", 10])]
    x = torch.randn(7, 3, 16, 16)
    (answer,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), small(x), atol=1e-5, rtol=1e-4)


def test_a_program_loads_again_without_the_class(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    export_program(small, (torch.randn(2, 3, 16, 16),), path)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(x), small(x))


def test_exporting_leaves_the_model_as_it_was(small: nn.Module, tmp_path: Path) -> None:
    small.train()
    before = copy.deepcopy(small.state_dict())
    export_program(small, (torch.randn(2, 3, 16, 16),), tmp_path / "model.pt2")
    assert all(module.training for module in small.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_exporting_prints_nothing(small: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(small, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def test_a_model_that_fixes_its_batch_size_is_exported_for_that_one_and_says_so(tmp_path: Path) -> None:
    report = export_onnx(
        FixedBatch(), (torch.randn(2, 3, 4, 4),), tmp_path / "m.onnx", real=(torch.rand(3, 3, 4, 4),)
    )
    assert not report.dynamic_batch
    assert report.notes and "fixed to 2" in report.notes[0]
    assert {c.batch for c in report.checks} == {2}


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("form", EXPORTS)
def test_a_model_that_cannot_be_captured_is_one_clear_line(form: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="DataDependent cannot be captured") as caught:
        EXPORTS[form](DataDependent(), (torch.randn(2, 3),), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Ignorant(nn.Module):
    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("form", EXPORTS)
def test_an_input_that_the_model_ignores_does_no_harm(form: str, tmp_path: Path) -> None:
    report = EXPORTS[form](Ignorant(), (torch.randn(2, 3), torch.randn(2, 5)), tmp_path / "model")
    assert report.max_error <= 1e-6


class Pretender(nn.Module):
    """Another function while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if torch.compiler.is_exporting() else x


def test_a_file_that_answers_differently_is_refused_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old one")
    with pytest.raises(VerificationError, match="differs from the model") as caught:
        export_program(Pretender(), (torch.randn(2, 3),), path)
    assert caught.value.max_error > 0
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_inputs_that_are_not_batches_of_tensors_are_refused(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="takes inputs other than batches"):
        export_onnx(small, ([torch.rand(3, 16, 16)],), tmp_path / "model.onnx")


def test_a_missing_onnx_package_names_the_line_that_installs_it(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'prunus\[onnx\]'"):
        export_onnx(small, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx")
