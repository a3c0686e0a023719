"""Everything the sweep asks of one model; runs in a process of its own: `python examination.py NAME`."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.catalog import build, construct
from prunus.adapters.pytorch.certification import certify, random_keep
from prunus.adapters.pytorch.comparison import evaluating, state_of
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.verification import Prepared, prepare, verify
from prunus.core.graph import ChannelGraph
from prunus.core.plan import PruningPlan

TARGET = 0.5
EXPENSIVE = 1e11
"""MACs of one image beyond which all examinations take one: a pass in float64 takes minutes."""


def examine(name: str) -> dict[str, Any]:
    """The record of one model; raises whatever goes wrong."""
    built = build(name, kwargs=_smaller(name))
    model, spec = built.module, built.input
    randomise(model)
    record: dict[str, Any] = {"model": name}
    start = time.process_time()
    prepared = prepare(model, spec.example(1), certified=False)
    record["trace_seconds"] = round(time.process_time() - start, 2)
    uncertified = len(prepared.graph.prunable)
    prepared.trace.graph = certify(model, prepared.trace, prepared.bindings, spec.example(1))
    record["seconds"] = round(time.process_time() - start, 2)
    record["trace_gib"] = _peak_gib()
    graph = prepared.graph
    dense = graph.cost()
    record |= {
        "params": int(dense.params),
        "macs": int(dense.macs),
        "groups": len(graph.prunable),
        "handlers": len(prepared.handlers),
        "locked": locks(graph),
        "locked_by_probe": uncertified - len(graph.prunable),
        "cost_exact": measured(model, spec.example(1)) == (dense.macs, dense.params),
    }
    smallest = {n: g.min_kept for n, g in graph.groups.items()}
    record["reachable"] = round(graph.cost(smallest).macs / dense.macs, 4)
    state = state_of(model)
    record["batch"] = several = 1 if dense.macs > EXPENSIVE else 2
    record["probe_error"] = max(
        _removed(model, prepared, state, random_keep(graph, seed), spec.example(batch, seed))[1]
        for seed, batch in ((10, 1), (11, several))
    )
    keep = uniform_keep(graph, TARGET)
    counts = {n: len(units) for n, units in keep.items()}
    predicted = graph.cost(counts)
    record["pruned_to"] = round(predicted.macs / dense.macs, 4)
    pruned, record["error"] = _removed(model, prepared, state, keep, spec.example(several))
    macs, params = measured(pruned, spec.example(1))
    # Where the number of proposals follows from values, the MACs of another model are those of other proposals.
    same_macs = macs == predicted.macs or prepared.trace.program.concrete
    record["pruned_cost_exact"] = same_macs and params == predicted.params
    edits = prepared.bindings.edits(graph.units, graph.units | counts)
    plan = PruningPlan.begin(built.source, graph, {}).after_removal(graph, keep, edits, prepared.handlers)
    record["replayed"] = _replays(plan, model, pruned, spec.example(1))
    record["gradients"] = "by name"
    record["backward"] = _trains(pruned, model, spec.kind, spec.example(several))
    return record


def randomise(model: nn.Module) -> None:
    """No zero gammas, no layer scales of 1e-6, no empty classifiers, no fresh statistics: they hide faults."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() < 2 or tensor.numel() == max(tensor.shape):
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise * 0.4 - 0.2 if "bias" in name else noise * 0.8 + 0.6)
            elif not tensor.any():
                inputs = tensor.numel() // tensor.shape[0]
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * inputs**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.8 + 0.6)


def locks(graph: ChannelGraph) -> dict[str, int]:
    """reason -> number of locked groups that could have been cut otherwise."""
    reasons: dict[str, int] = {}
    for group in graph.groups.values():
        if group.locked is not None and group.units > 1:
            reason = re.sub(r"( in)? [\w.]+ \(\w+\)", "", group.locked)[:160]
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def measured(model: nn.Module, args: tuple[Any, ...]) -> tuple[float, float]:
    """(MACs of one sample, parameters), by torch's own counter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    counter, recurrent = FlopCounterMode(display=False), [0]

    def count(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        """torch counts no LSTM: at each step of each sequence, every weight is used once."""
        weights = sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))
        recurrent[0] += weights * args[0].shape[:-1].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.LSTM)]
    try:
        model.requires_grad_(False)  # the counter sees one attention kernel where gradients are wanted
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH), evaluating(model):
            model(*args)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() / 2 + recurrent[0], float(sum(p.numel() for p in model.parameters()))


def uniform_keep(graph: ChannelGraph, target: float) -> dict[str, list[int]]:
    """The largest uniform share of units under `target` of the MACs; which units stay is random."""
    dense = graph.cost().macs

    def counts(share: float) -> dict[str, int]:
        found = {}
        for name, group in graph.prunable.items():
            step = group.multiple_of
            found[name] = min(group.units, max(group.min_kept, round(share * group.units / step) * step))
        for names in graph.equal_counts.values():
            found.update({name: max(found[n] for n in names) for name in names if name in found})
        return found

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if graph.cost(counts(middle)).macs <= target * dense else (low, middle)
    rng = np.random.default_rng(0)
    return {
        name: sorted(rng.permutation(graph.groups[name].units)[:count].tolist())
        for name, count in counts(low).items()
    }


def _smaller(name: str) -> dict[str, Any]:
    """Detection at sizes that one core can sweep: small images, and few of them looked at again."""
    if not any(part in name for part in ("rcnn", "retinanet", "fcos")):
        return {}
    few = {"box_detections_per_img": 10} if "maskrcnn" in name or "keypointrcnn" in name else {}
    return {"min_size": 160, "max_size": 200, **few}


def _removed(
    model: nn.Module, prepared: Prepared, state: dict[str, Tensor], keep: dict[str, list[int]], args: Any
) -> tuple[nn.Module, float]:
    """The pruned model, and its error against the masked one, relative to the largest output."""
    graph = prepared.graph
    pruned = structural_copy(model)
    after = graph.units | {name: len(units) for name, units in keep.items()}
    remove(pruned, graph, keep, prepared.bindings.edits(graph.units, after))
    verdict = verify(pruned, prepared, state, keep, args)
    return pruned, verdict.max_error / (verdict.scale or 1.0)


def _replays(plan: PruningPlan, model: nn.Module, pruned: nn.Module, args: tuple[Any, ...]) -> bool:
    """The plan, through JSON, on a fresh instance with the original weights: the same model, bit for bit."""
    fresh = construct(plan.model)
    fresh.load_state_dict(model.state_dict())
    apply_plan(fresh, PruningPlan.model_validate_json(plan.model_dump_json(by_alias=True)))
    fresh.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        got, expected = (pytree.tree_leaves(m.eval()(*args)) for m in (fresh, pruned))
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if isinstance(a, Tensor))


def _trains(pruned: nn.Module, model: nn.Module, kind: str, args: tuple[Any, ...]) -> bool:
    """A backward pass in train mode: finite gradients, for every parameter that has one before the removal."""
    before, after = set(_gradients(model, kind, args)), _gradients(pruned, kind, args)
    return bool(before) and before <= set(after) and all(after.values())


def _gradients(model: nn.Module, kind: str, args: tuple[Any, ...]) -> dict[str, bool]:
    """parameter -> whether its gradient is finite; parameters without one are left out."""
    model.train().requires_grad_(True)
    outputs = pytree.tree_leaves(model(*args, *([_targets(args[0])] if kind == "images" else [])))
    leaves = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([leaf.float().square().mean() for leaf in leaves]).sum().backward()
    found = {n: bool(torch.isfinite(p.grad).all()) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _targets(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """One object per image, with everything that a detection model may learn from."""
    found = []
    for image in images:
        height, width = image.shape[1:]
        left, top, right, bottom = width // 8, height // 8, width // 2, height // 2
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, top:bottom, left:right] = 1
        points = torch.tensor([[[(left + right) / 2, (top + bottom) / 2, 1.0]] * 17])
        box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
        found.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": points})
    return found


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = examine(sys.argv[1])
    record["peak_gib"] = _peak_gib()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
