"""Models and data given as objects: what cannot be followed is refused, what would be ignored, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from prunus.adapters.pytorch import begin, load, prune
from prunus.core.errors import ConfigError, LoadError, TraceError

IMAGES = torch.zeros(40, 3, 8, 8)
DATA = TensorDataset(IMAGES, torch.arange(40) % 2)


def _module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "ignored",
    [{"train_data": DATA}, {"test_data": DATA}, {"example_inputs": IMAGES[:2]}, {"trained": False}],
    ids=lambda ignored: next(iter(ignored)),
)
def test_a_model_by_name_takes_no_objects(ignored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes with a module; 'prunus/resnet8'") as caught:
        prune("prunus/resnet8", **ignored)
    assert caught.value.key == next(iter(ignored))


@pytest.mark.parametrize(
    "ignored",
    [
        {"data": "fashion-mnist"},
        {"data": "none"},  # beside train_data
        {"pretrained": True},
        {"checkpoint": "weights.safetensors"},
        {"img_size": 32},
        {"adapter": "pytorch"},
    ],
    ids=lambda ignored: "=".join(map(str, *ignored.items())),
)
def test_a_module_takes_nothing_by_name(ignored: dict[str, Any]) -> None:
    model, (key,) = _module(), ignored
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="that has a name") as caught:
        prune(model, IMAGES[:2], train_data=DATA, **ignored)
    assert caught.value.key == key
    with pytest.raises(ConfigError, match="that has a name") as caught:
        begin(model, IMAGES[:2], optimizer=optimizer, train_data=DATA, epochs=1, **ignored)
    assert caught.value.key == key


def test_a_module_may_say_that_it_has_no_data(tmp_path: Path) -> None:
    ranked = {"plugin": "one-shot", "importance": "magnitude", "target": "macs=60%", "output": tmp_path / "run"}
    pruned = prune(_module(), IMAGES[:2], data="none", **ranked)
    assert pruned.report.data == "none"


class Remembering(nn.Module):
    """Keeps an object in its state dict that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images).mean((2, 3)))
        return out

    def get_extra_state(self) -> dict[str, str]:
        return {"recipe": "mine"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state == {"recipe": "mine"}


def test_state_that_is_no_tensor_is_left_to_the_class_that_keeps_it(tmp_path: Path) -> None:
    trains = {"epochs": 1, "batch_size": 6, "lr": 0.01, "model_ema": True, "output": tmp_path / "run"}
    pruned = prune(Remembering(), IMAGES[:2], train_data=DATA, plugin="iterative", target="macs=60%", **trains)
    again = load(tmp_path / "run", original=Remembering())
    assert torch.equal(again(IMAGES[:2]), pruned.model(IMAGES[:2]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["compiled by torch.jit", "compiled by torch.compile", "a wrapper", "quantized"])
def test_a_model_out_of_pythons_reach_is_refused_with_what_to_do(kind: str) -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    if kind == "quantized":
        last = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 2)), dtype=torch.qint8)
    elif kind == "a wrapper":
        convolution, last = nn.DataParallel(convolution), nn.Linear(8, 2)
    elif kind == "compiled by torch.compile":
        convolution, last = torch.compile(convolution), nn.Linear(8, 2)
    else:
        convolution, last = torch.jit.script(convolution), nn.Linear(8, 2)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    with pytest.raises(TraceError, match=rf"is {kind}; prune the model that it was made from, then"):
        prune(model, IMAGES[:2], plugin="one-shot", importance="magnitude")


class Attending(nn.Module):
    """What enters nn.MultiheadAttention's projections is not measured."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        out: Tensor = self.head(self.hidden(tokens).relu().mean(1))
        return out


@pytest.mark.parametrize("plugin", ["gsm-anneal", "bayes-reparam"])
def test_widths_are_tried_beside_layers_whose_inputs_nobody_measures(plugin: str, tmp_path: Path) -> None:
    config = {"sensitivity": "yes", "sweeps": 1}
    trains = {"epochs": 1, "batch_size": 6, "lr": 0.01, "output": tmp_path / "run"}
    pruned = prune(
        Attending(), IMAGES[:2], train_data=DATA, plugin=plugin, target="macs=60%", config=config, **trains
    )
    assert pruned.report.target_met
    noted = {row.get("kind") for row in pruned.report.history} | {row.get("note") for row in pruned.report.history}
    assert noted & {"energies", "covariance-missing"}


class Samples(Dataset[Any]):
    """`sample` again and again."""

    def __init__(self, sample: Any, count: int = 40) -> None:
        self.sample, self.count = sample, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.sample


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Samples({"image": IMAGES[0], "label": 1}), "sample 0 of the data set is a dict, not a pair"),
        (Samples((IMAGES[0],)), "is a tuple of 1, not a pair of image and label"),
        (Samples(IMAGES[0]), "is a Tensor, not a pair"),
        (Samples((IMAGES[0].to(torch.uint8), 1)), "is torch.uint8, example_inputs are torch.float32"),
        (Samples((IMAGES[0, :1], 1)), r"has shape \(1, 8, 8\), those of example_inputs have \(3, 8, 8\)"),
        (Samples((IMAGES[0], IMAGES[0])), "no class number"),
        (Samples((IMAGES[0], 1), count=0), "train_data is empty"),
    ],
    ids=lambda value: value.split("data set")[-1] if isinstance(value, str) else "",
)
def test_samples_that_the_model_cannot_take_are_named(data: Dataset[Any], said: str) -> None:
    with pytest.raises(LoadError, match=said):
        prune(_module(), IMAGES[:2], train_data=data)


def test_images_come_in_the_precision_of_the_model_and_labels_as_the_data_set_transforms_them(
    tmp_path: Path,
) -> None:
    data = Samples((IMAGES[0], 1))
    data.targets, data.target_transform = [7] * 40, lambda label: 1  # type: ignore[attr-defined]
    trains = {"epochs": 1, "batch_size": 6, "lr": 0.01, "output": tmp_path / "run", "target": "macs=60%"}
    pruned = prune(_module().double(), IMAGES[:2].double(), train_data=data, plugin="iterative", **trains)
    assert pruned.report.target_met and pruned.model(IMAGES[:2].double()).dtype == torch.float64


class Conditioned(nn.Module):
    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        return images.mean((2, 3)) + condition


@pytest.mark.parametrize(
    ("model", "example", "said"),
    [
        (nn.Linear, IMAGES[:2], "must be a module or a name"),
        (_module(), [IMAGES[:2]], "the tuple of its arguments, got list"),
        (Conditioned(), (IMAGES[:2], torch.ones(2, 3)), "images alone.*missing a required argument: 'condition'"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), IMAGES[:2], "nothing of this model can be removed"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_objects_that_cannot_be_used_are_refused_by_name(model: Any, example: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prune(model, example, train_data=DATA, target="macs=1G", batch_size=6)


def test_weights_that_are_not_there_are_asked_for() -> None:
    with pytest.raises(TraceError, match=r"0.weight is on the meta device; load the weights first"):
        prune(_module().to("meta"), IMAGES[:2], train_data=DATA)


def _of_axes(axes: int) -> tuple[nn.Module, Tensor]:
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    pool = nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), *pool, nn.Linear(8, 2)), torch.randn(
        40, 3, *(6,) * axes
    )


@pytest.mark.parametrize("axes", [1, 3])
def test_inputs_with_other_axes_than_images_keep_their_layout_and_cannot_be_cut(axes: int, tmp_path: Path) -> None:
    model, inputs = _of_axes(axes)
    data = TensorDataset(inputs, torch.arange(40) % 2)
    fields: dict[str, Any] = {"train_data": data, "plugin": "iterative", "config": {"rounds": 1}, "epochs": 1}
    fields |= {"batch_size": 12, "lr": 0.01, "target": "macs=60%", "output": tmp_path / "run"}
    pruned = prune(model, inputs[:2], channels_last=True, mixup=0.2, **fields)
    assert pruned.report.target_met
    with pytest.raises(ConfigError, match=r"--cutmix cuts rectangles .*, the inputs are \(2, 3, 6") as caught:
        prune(model, inputs[:2], cutmix=1.0, overwrite=True, **fields)
    assert caught.value.key == "cutmix"


class Mapped(nn.Module):
    """Multiplies by a sparse matrix that it holds."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("adjacency", torch.eye(4).to_sparse(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.stack([torch.sparse.mm(self.adjacency, nodes) for nodes in x])
        out: Tensor = self.two(self.one(mixed).relu())
        return out


def test_sparse_buffers_are_refused_where_they_must_be_saved(tmp_path: Path) -> None:
    example = torch.randn(2, 4, 8)
    ranked = {"plugin": "one-shot", "importance": "magnitude", "target": "macs=70%", "output": tmp_path / "run"}
    with pytest.raises(
        LoadError, match=r"^adjacency is a sparse tensor \(torch.sparse_coo\), which cannot be saved"
    ):
        prune(Mapped(True), example, **ranked)
    pruned = prune(Mapped(False), example, **ranked)
    again = load(tmp_path / "run", original=Mapped(False))
    assert torch.equal(again(example), pruned.model(example))
