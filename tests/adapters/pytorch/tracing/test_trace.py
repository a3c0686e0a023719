"""What a trace says about a model as a whole: cost, names, locks, and that the model stays as it was."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunus.adapters.pytorch.tracing import masked_call, trace_model
from prunus.core.errors import TraceError

FAMILIES = {
    "residual": lambda: timm.create_model("resnet10t"),
    "grouped": lambda: timm.create_model("regnetx_002"),
    "depthwise with squeeze-excite": lambda: timm.create_model("mobilenetv3_small_050"),
    "concatenation": lambda: torchvision.models.squeezenet1_1(),
    "attention": lambda: timm.create_model("test_vit"),
    "shuffle": lambda: torchvision.models.shufflenet_v2_x0_5(),
    "layer norm": lambda: timm.create_model("test_convnext"),
}


def image(size: int = 64, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def example(model: nn.Module) -> torch.Tensor:
    return image(160 if "Vision" in type(model).__name__ else 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_of_the_whole_model_equals_an_independent_count(family):
    model = FAMILIES[family]().eval().requires_grad_(False)
    x = example(model)
    cost = trace_model(model, x).graph.cost()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert cost.macs * 2 == counter.get_total_flops()
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_pruned_for_family(family, certify):
    model = FAMILIES[family]()
    certify(model, example(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_sees_the_operators_that_torch_export_sees(family):
    model = FAMILIES[family]().eval()
    x = example(model)
    recorded = [s.op for s in trace_model(model, x).program.steps if s.target is not None]
    exported = torch.export.export(model, (x,), strict=False).graph
    calls = [n for n in exported.nodes if n.op == "call_function"]
    assert len(recorded) >= 0.9 * len(calls)
    for kind in ("conv2d", "linear", "batch_norm", "layer_norm", "scaled_dot_product_attention"):
        expected = sum(n.target._schema.name == f"aten::{kind}" for n in calls if hasattr(n.target, "_schema"))
        assert recorded.count(f"aten.{kind}") == expected


def test_predicted_cost_equals_the_measured_cost_of_the_pruned_program(keep_at_random):
    """Costs of the pruned operators, counted while the oracle runs them."""
    model = FAMILIES["attention"]().eval()
    x = example(model)
    trace = trace_model(model, x)
    keep = keep_at_random(trace.graph, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trace.pruned_output(model.state_dict(), keep, x)
    counts = {name: len(units) for name, units in keep.items()}
    assert trace.graph.cost(counts).macs * 2 == counter.get_total_flops()


def test_macs_are_those_of_one_sample():
    model = FAMILIES["residual"]()
    assert trace_model(model, image(batch=4)).graph.cost() == trace_model(model, image()).graph.cost()


def test_two_traces_have_the_same_fingerprint():
    model = FAMILIES["attention"]()
    x = example(model)
    assert trace_model(model, x).graph.fingerprint == trace_model(model, x).graph.fingerprint


def test_groups_are_named_after_the_first_tensor_that_writes_them():
    graph = trace_model(FAMILIES["residual"](), image()).graph
    for name, group in graph.groups.items():
        first = next(piece.tensor for piece in group.slices if piece.role == "writes")
        assert name.split("#")[0] == first
    tensors = [name for group in graph.groups.values() for name in [group.name.split("#")[0]]]
    order = list(graph.tensors)
    assert [order.index(t) for t in tensors] == sorted(order.index(t) for t in tensors)


def test_the_classifier_is_locked_as_model_output():
    graph = trace_model(FAMILIES["residual"](), image()).graph
    assert graph.groups["fc.weight"].locked == "model output"


def test_the_model_is_left_exactly_as_it_was():
    model = timm.create_model("levit_128s").train()
    model.stages[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    caches = [sorted(vars(m)) for m in model.modules()]
    trace_model(model, image(224))
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == caches
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    assert type(model(image(224))) is torch.Tensor


def test_a_cached_bias_does_not_hide_its_parameter():
    fresh, used = timm.create_model("levit_128s").eval(), timm.create_model("levit_128s").eval()
    used(image(224))
    assert trace_model(used, image(224)).graph.fingerprint == trace_model(fresh, image(224)).graph.fingerprint


def test_auxiliary_heads_follow_although_only_training_runs_them():
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    graph = trace_model(model, image(128)).graph
    assert "aux1.conv.conv.weight" in graph.tensors
    assert {s.tensor for g in graph.groups.values() for s in g.slices} >= {"aux2.fc1.weight", "aux1.fc2.weight"}


class Strange(nn.Module):
    """An operator that no rule knows, on one of two branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, x):
        a = self.a(x)
        strange = torch.linalg.matrix_exp(a[:, :, None] * a[:, None, :]).sum(2)
        return self.head(torch.cat([strange, F.relu(self.b(x))], 1))


def test_an_unknown_operator_locks_what_it_touches_and_names_itself():
    trace = trace_model(Strange(), torch.randn(1, 4))
    assert "matrix_exp" in trace.graph.groups["a.weight"].locked
    assert trace.graph.groups["b.weight"].locked is None
    assert list(trace.unknown) == ["aten.linalg_matrix_exp"]


def test_a_model_that_fails_on_its_example_is_an_error_with_the_reason():
    with pytest.raises(TraceError, match="Linear fails on its example inputs in eval mode"):
        trace_model(nn.Linear(4, 2), torch.randn(1, 5))


class Choosy(nn.Module):
    """Asks for a value: no fake tensor can answer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h) if h.sum().item() >= 0 else self.b(-h)


def test_a_model_that_asks_for_values_is_traced_on_real_ones_and_masked_by_running_it():
    model, x = Choosy().eval(), torch.randn(1, 4)
    trace = trace_model(model, x)
    assert trace.program.concrete
    keep = {"a.weight": np.array([0, 2, 5])}
    expected = F.linear(F.relu(model.a(x))[:, keep["a.weight"]], model.b.weight[:, keep["a.weight"]], model.b.bias)
    assert torch.allclose(masked_call(model, trace.graph, keep, (x,)), expected, atol=1e-6)
    with pytest.raises(TraceError, match="masked_call"):
        trace.masked_output(model.state_dict(), keep, x)


@pytest.mark.parametrize("family", ["attention", "layer norm", "grouped"])
def test_masking_while_running_equals_masking_the_recording(family, keep_at_random):
    model = FAMILIES[family]().eval()
    x = torch.cat([example(model), example(model).flip(3)])
    trace = trace_model(model, x)
    keep = keep_at_random(trace.graph, 2)
    live = masked_call(model, trace.graph, keep, (x,))
    recorded = trace.masked_output(model.state_dict(), keep, x)
    assert live.shape == (2, 1000)
    assert (live - recorded).abs().max() < 1e-5 * recorded.abs().max().clamp_min(1e-3)


def test_literal_sites_name_the_module_and_predict_the_new_number():
    trace = trace_model(FAMILIES["attention"](), example(FAMILIES["attention"]()))
    full = trace.graph.units
    norms = [site for site in trace.sites if site.argument == "normalized_shape"]
    assert norms and all(site.owner_class == "LayerNorm" for site in norms)
    assert all(site.extent.at(full) == site.value for site in trace.sites)


def test_tracing_a_deep_network_takes_seconds():
    model = torchvision.models.densenet121()
    started = time.process_time()
    trace_model(model, image(64))
    assert time.process_time() - started < 10
