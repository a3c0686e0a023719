"""torch-pruning's own steps, down to a number of MACs that is met within 1%."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.rivals.bench import Bench
from prunus.adapters.pytorch.distillation import classification_loss
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph

TOLERANCE = 0.01
IMAGES, BATCH = 256, 64
"""That gradients are measured on at each step, by importances that need them."""
_MANY = 12
"""From so many groups on, the last step's choice is greedy."""

Counts = dict[str, int]


def prune_to(bench: Bench, model: nn.Module, pruner: tp.pruner.BasePruner, floor: float) -> float:
    """Step until the job's limit is met; returns the MACs. Raises PlanError if the steps end before.

    A group that would keep less than `floor`, a share of its channels, is left as it is.
    """
    limit, graph, tree = bench.job.limit, bench.graph, _Groups(bench.graph, model)
    importance = pruner.importance
    while pruner.current_step < pruner.iterative_steps:
        _measure(bench, model, pruner)
        fisher = dict(getattr(importance, "Fisher", {}))
        before = tree.counts()
        proposed = {name: before[name] - removed for name, removed in tree.listed(pruner)}
        least = {name: max(1, math.ceil(floor * graph.groups[name].units)) for name in proposed}
        proposed = {name: count for name, count in proposed.items() if count >= least[name]}
        wanted = affordable(graph, before, proposed, limit)
        if fisher:
            importance.Fisher = fisher
        pruner.current_step -= 1  # the same step again, now in earnest
        for group in pruner.step(interactive=True):
            if tree.name(group) in wanted:
                group.prune()
        _forget(model, importance)
        macs = graph.cost(tree.counts()).macs
        if macs <= limit * (1 + TOLERANCE):
            return macs
    raise PlanError(f"torch-pruning ended at {graph.cost(tree.counts()).macs:.0f} MACs, the target is {limit:.0f}")


class _Groups:
    """Which of our channel groups a group of torch-pruning's is, and how wide it is now."""

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._groups: dict[nn.Module, str] = {}
        for group in graph.groups.values():
            for piece in (
                *group.with_role("writes"),
                *group.with_role("scales"),
            ):  # depthwise: a scale per channel
                module = modules.get(piece.tensor.removesuffix(".weight"))
                if piece.axis == 0 and isinstance(module, nn.Conv2d | nn.Linear):
                    self._groups[module] = group.name

    def name(self, group: tp.Group) -> str:
        return self._groups[group[0].dep.target.module]

    def listed(self, pruner: tp.pruner.BasePruner) -> Iterator[tuple[str, int]]:
        """(our group, channels) that the pruner's next step would remove; nothing is removed."""
        for group in pruner.step(interactive=True):
            yield self.name(group), len(group[0].idxs)

    def counts(self) -> Counts:
        return {name: int(module.weight.shape[0]) for module, name in self._groups.items()}  # type: ignore[union-attr, index]


def affordable(graph: ChannelGraph, before: Counts, proposed: Counts, limit: float) -> Counts:
    """All of `proposed` while that stays above the limit, else the choice of it that comes down to it nearest.

    What would fall below the limit by more than the tolerance is put off: a later step proposes it again.
    """

    def macs(chosen: Counts) -> float:
        return graph.cost({**before, **chosen}).macs

    least = limit * (1 - TOLERANCE)
    if macs(proposed) >= least:
        return dict(proposed)
    if len(proposed) < _MANY:
        names = list(proposed)
        choices = (
            {name: proposed[name] for name in subset}
            for size in range(len(names) + 1)
            for subset in itertools.combinations(names, size)
        )
        return min((chosen for chosen in choices if macs(chosen) >= least), key=macs)
    chosen: Counts = {}
    for name, count in proposed.items():
        if macs({**chosen, name: count}) >= least:
            chosen[name] = count
    return chosen


def _measure(bench: Bench, model: nn.Module, pruner: tp.pruner.BasePruner) -> None:
    """Gradients, and for OBDC the Fisher of sampled labels, as the authors' main_imagenet.py collects them."""
    importance = pruner.importance
    obdc = isinstance(importance, tp.importance.OBDCImportance)
    if not obdc and not isinstance(importance, tp.importance.GroupTaylorImportance):
        return
    if obdc:
        _watch(pruner)
    model.eval()
    model.zero_grad()
    generator = torch.Generator().manual_seed(pruner.current_step)
    with torch.enable_grad():
        for images, labels in bench.data.calibration.part(IMAGES):
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                output = model(x)
                if obdc:
                    y = torch.multinomial(output.detach().softmax(1), 1, generator=generator)[:, 0]
                classification_loss(output, y).backward()
                if obdc:
                    importance.step()


def _watch(pruner: tp.pruner.BasePruner) -> None:
    """What OBDC's own `_prepare_model` means to do; in 1.6.1 it fails on every network without attention."""
    importance, graph = pruner.importance, pruner.DG
    for group in graph.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        for dep, _ in group:
            layer = dep.target.module
            if isinstance(layer, tuple(importance.target_types)) and graph.is_out_channel_pruning_fn(dep.handler):
                importance.modules.append(layer)
                layer.register_forward_pre_hook(importance._save_input)
                layer.register_backward_hook(importance._save_grad_output)


def _forget(model: nn.Module, importance: object) -> None:
    model.zero_grad()
    if isinstance(importance, tp.importance.OBDCImportance):
        importance._rm_hooks(model)
        importance._clear_buffer()
