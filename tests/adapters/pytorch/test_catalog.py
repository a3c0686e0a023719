"""Models are built by the names that users type, and refused in one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prunus.adapters.pytorch.catalog import build, construct
from prunus.adapters.pytorch.inputs import ImageFacts, InputSpec
from prunus.core.errors import LoadError
from prunus.core.plan import ModelSource

SMALL = ImageFacts((28, 28), 0.286, 0.353)


def refusal(name: str, **options: object) -> str:
    with pytest.raises(LoadError) as caught:
        build(name, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 4
    return message


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/mobilenetv3_small_050", (1, 32, 32)),
        ("timm/vit_tiny_patch16_224", (1, 32, 32)),
        ("torchvision/squeezenet1_1", (3, 32, 32)),
        ("prunus/resnet14_s2", (1, 28, 28)),
        ("prunus/vgg11_bn_small", (1, 28, 28)),
    ],
)
def test_a_model_takes_the_classes_channels_and_size_of_small_grey_images(
    name: str, size: tuple[int, int, int]
) -> None:
    built = build(name, classes=7, in_chans=1, image=SMALL)
    assert built.input.size == size
    assert built.input.mean == (0.286,) * size[0]
    assert built.classes == 7
    assert not built.has_weights
    with torch.no_grad():
        assert built.module(*built.input.example(3)).shape == (3, 7)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/mnasnet0_5", "prunus/resnet8"])
def test_the_source_rebuilds_the_same_architecture_after_a_trip_through_json(name: str) -> None:
    built = build(name, classes=7, in_chans=1, image=SMALL)
    source = ModelSource.model_validate_json(built.source.model_dump_json())
    again = construct(source)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in built.module.state_dict().items()
    }


def test_the_input_survives_a_trip_through_json() -> None:
    spec = build("timm/test_resnet").input
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_one_seed_gives_one_initialisation_and_leaves_the_global_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = build("prunus/resnet8", seed=3).module, build("prunus/resnet8", seed=3).module
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_without_small_data_the_published_input_size_holds() -> None:
    assert build("timm/test_resnet").input.size == (3, 160, 160)
    assert build("torchvision/squeezenet1_1").input.size == (3, 224, 224)


def test_img_size_reaches_models_that_fix_it_when_they_are_built() -> None:
    built = build("timm/vit_tiny_patch16_224", img_size=64)
    assert built.source.kwargs["img_size"] == 64
    assert built.input.size == (3, 64, 64)


def test_a_size_that_the_model_cannot_take_is_refused() -> None:
    assert "--img-size" in refusal("torchvision/inception_v3", img_size=32)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm/mobilenetv3_smal_050", "timm/mobilenetv3_small_050"),
        ("torchvision/resnet_18", "torchvision/resnet18"),
        ("prunus/resnet21", "prunus/resnet20"),
        ("resnet18", "timm/resnet18"),
        ("keras/resnet18", "timm/NAME"),
        ("timm/resnet18.no_such_tag", "a1_in1k"),
        ("python:no_such_module:make", "no_such_module"),
        ("python:os", "python:package.module:factory"),
        ("python:os:getcwd", "not a torch.nn.Module"),
        ("python:os:no_such_factory", "no_such_factory"),
    ],
)
def test_an_unknown_model_is_refused_with_what_would_do(name: str, hint: str) -> None:
    assert hint in refusal(name)


def test_weights_that_nobody_published_are_refused() -> None:
    assert "--checkpoint" in refusal("prunus/resnet20", pretrained=True)
    assert "exclude" in refusal("prunus/resnet20", pretrained=True, checkpoint=Path("x.safetensors"))


def test_keywords_from_a_file_cannot_reach_for_files_or_code() -> None:
    for name, kwargs in [
        ("timm/test_resnet", {"checkpoint_path": "/elsewhere/evil.pth"}),
        ("timm/test_resnet", {"pretrained": True}),
        ("torchvision/resnet18", {"weights": "DEFAULT"}),
        ("timm/hf-hub:somebody/model", {}),
        ("timm/local-dir:/tmp", {}),
        ("python:os:getcwd", {}),
    ]:
        with pytest.raises(LoadError):
            construct(ModelSource(name=name, kwargs=kwargs))


def test_a_python_factory_must_suit_the_classes_and_channels_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "from torch import nn\n"
        "def fixed():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))\n"
        "def grey():\n    return nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def fitting(num_classes, in_chans):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "5 classes" in refusal("python:my_own_models:fixed", classes=10, img_size=8)
    grey = "python:my_own_models:grey"
    assert build(grey, classes=10, in_chans=1, img_size=8).input.size == (1, 8, 8)
    assert "3x8x8" in refusal(grey, classes=10, in_chans=3, img_size=8)
    built = build("python:my_own_models:fitting", classes=10, in_chans=1, img_size=8)
    assert built.classes == 10
    assert construct(built.source, allow_python=True)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_models_of_other_kinds_come_with_examples_of_their_inputs() -> None:
    video = build("torchvision/r3d_18").input
    assert video.kind == "video"
    assert video.example(1)[0].shape == (1, 3, 16, 112, 112)
    assert len(build("torchvision/raft_small").input.example(1)) == 2
    assert isinstance(build("torchvision/ssdlite320_mobilenet_v3_large").input.example(2)[0], list)


def test_every_zoo_model_runs_on_images_of_eight_pixels() -> None:
    for name in ("resnet8", "resnet14", "resnet14_s2", "resnet20", "resnet32", "resnet56", "vgg11_bn_small"):
        module = build(f"prunus/{name}", classes=4, in_chans=1, image=ImageFacts((8, 8))).module
        assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_resnet20_has_the_parameters_that_the_paper_counts() -> None:
    # He et al. 2016, table 6: 0.27 M; here two 1x1 shortcuts with norms, and a stem for colour images
    module = build("prunus/resnet20").module
    blocks = 3 * 2 * 9 * 16**2 + 9 * 16 * 32 + 5 * 9 * 32**2 + 9 * 32 * 64 + 5 * 9 * 64**2
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64 + 32 + 64)
    assert sum(p.numel() for p in module.parameters()) == 27 * 16 + blocks + shortcuts + norms + 64 * 10 + 10
    assert isinstance(module, nn.Module)
