"""A handler computes what the class it stands in for computes, bit for bit, on the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from prunus.adapters.pytorch.handlers import handled_name, install_handlers, known, needed
from prunus.core.errors import PlanError

FAMILIES = {
    "test_vit_relpos": 160,
    "vit_tiny_patch16_dinov3_qkvb": 64,
    "beit_base_patch16_224": 224,
    "cait_xxs24_224": 224,
    "convit_tiny": 224,
    "xcit_nano_12_p8_224": 64,
    "crossvit_tiny_240": 240,
    "pvt_v2_b0": 96,
    "pvt_v2_b2_li": 96,
    "coat_tiny": 224,
    "volo_d1_224": 224,
    "davit_tiny": 64,
    "edgenext_xx_small": 64,
    "nest_tiny": 224,
    "nextvit_small": 64,
    "cpubone_nano": 64,
    "swinv2_tiny_window8_256": 256,
    "swinv2_cr_tiny_224": 224,
    "twins_svt_small": 224,
    "gcvit_xxtiny": 224,
    "fastvit_sa12": 64,
    "caformer_s18": 64,
    "torchvision/swin_t": 64,
    "torchvision/swin_v2_t": 64,
    "torchvision/vit_b_32": 224,
    "torchvision/maxvit_t": 224,
}
SHORT = ("test_vit_relpos", "cait_xxs24_224", "edgenext_xx_small", "torchvision/swin_t", "torchvision/swin_v2_t")


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        model = torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None)
    else:
        model = timm.create_model(name)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # layer scales of 1e-6 would hide everything
            nn.init.normal_(parameter, 1.0, 0.1)
    return model.eval()


def _check(name: str) -> None:
    model = _build(name)
    x = torch.randn(2, 3, FAMILIES[name], FAMILIES[name])
    with torch.no_grad():
        expected = model(x)
        handlers = needed(model)
        assert handlers
        install_handlers(model, handlers)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", SHORT)
def test_the_function_stays(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(SHORT)))
def test_the_function_stays_in_every_family(name: str) -> None:
    _check(name)


def test_the_function_of_a_video_swin_stays_with_and_without_padding() -> None:
    torch.manual_seed(0)
    layer = ShiftedWindowAttention3d(12, [4, 3, 3], [2, 1, 1], num_heads=3).eval()
    nn.init.normal_(layer.relative_position_bias_table)
    inputs = [torch.randn(2, *size, 12) for size in ((8, 6, 6), (7, 5, 7), (2, 6, 6))]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        install_handlers(layer, needed(layer))
        assert all(torch.equal(layer(x), y) for x, y in zip(inputs, expected, strict=True))


def test_every_handler_names_a_class_that_exists() -> None:
    for name in known():
        module, _, kind = name.rpartition(".")
        assert isinstance(getattr(__import__(module, fromlist=[kind]), kind), type)


def test_a_handled_module_is_still_of_its_class_and_copies_and_pickles() -> None:
    model = _build("torchvision/swin_t")
    kind = type(model.features[1][0].attn)
    install_handlers(model, needed(model))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attention = clone.features[1][0].attn
        assert isinstance(attention, kind)
        assert handled_name(attention) == "torchvision.models.swin_transformer.ShiftedWindowAttention"
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(clone(x), model(x))


def test_installing_twice_changes_nothing() -> None:
    model = _build("torchvision/swin_t")
    handlers = needed(model)
    install_handlers(model, handlers)
    kind = type(model.features[1][0].attn)
    install_handlers(model, handlers)
    assert type(model.features[1][0].attn) is kind
    assert not needed(model)


def test_a_handler_for_another_class_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    name = next(iter(known()))
    for handlers in ({"0": name}, {"1": name}, {"0": "nowhere.Class"}):
        with pytest.raises(PlanError):
            install_handlers(model, handlers)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["plain", "cross", "bool", "float", "padding", "unbatched"])
def test_multihead_attention_covers_torchs_options(batch_first: bool, need_weights: bool, kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    nn.init.normal_(layer.in_proj_bias)

    def tokens(count: int) -> Tensor:
        if kind == "unbatched":
            return torch.randn(count, 8)
        return torch.randn(3, count, 8) if batch_first else torch.randn(count, 3, 8)

    query = tokens(5)
    other = tokens(4) if kind == "cross" else query
    mask = {"bool": torch.ones(5, 5).triu(1).bool(), "float": torch.randn(5, 5)}.get(kind)
    padding = torch.tensor([[False] * 4 + [True]] * 3) if kind == "padding" else None
    options = {"need_weights": need_weights, "attn_mask": mask, "key_padding_mask": padding}
    with torch.no_grad():
        expected, expected_weights = layer(query, other, other, **options)
        install_handlers(layer, needed(layer))
        got, weights = layer(query, other, other, **options)
    torch.testing.assert_close(got, expected)
    assert (weights is None) == (not need_weights)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def test_multihead_attention_with_separate_projections_is_left_alone() -> None:
    assert not needed(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    assert not needed(nn.MultiheadAttention(8, 2, add_bias_kv=True))


def test_optical_flow_keeps_its_correlations_scale_when_the_features_get_narrower() -> None:
    torch.manual_seed(0)
    model = torchvision.models.optical_flow.raft_small().eval()
    pair = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected = model(*pair, num_flow_updates=2)
        install_handlers(model, needed(model))
        result = model(*pair, num_flow_updates=2)
        encoder = model.feature_encoder.conv  # half of the features are silent: without them, the same flow
        encoder.weight[64:], encoder.bias[64:] = 0.0, 0.0
        whole = model(*pair, num_flow_updates=2)
        encoder.weight, encoder.bias = nn.Parameter(encoder.weight[:64]), nn.Parameter(encoder.bias[:64])
        narrow = model(*pair, num_flow_updates=2)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(narrow, whole, strict=True))
    with pytest.raises(ValueError, match="divisible by 8"):
        model(torch.rand(1, 3, 100, 100), torch.rand(1, 3, 100, 100))
