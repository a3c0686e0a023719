"""The convolutions of a model run as branches, and are merged again; what that does to graph and optimizer.

`branches` has the modules; here they are put in place and taken away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.branches import Branch, BranchedConv2d, affine
from prunus.adapters.pytorch.comparison import distance, evaluating, verified
from prunus.adapters.pytorch.patches import layer_input
from prunus.adapters.pytorch.signals import Batch, images_of, measuring
from prunus.core.blocks import Block
from prunus.core.directives import Verification
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, Role, Slice
from prunus.core.plan import Branching

SHARE = 0.1
"""Norm of a new branch's kernel over that of the convolution's, output by output: small beside what is learned."""
HALF = 0.5
"""The part of the centre tap that `point` takes over."""
Exchange = tuple[list[nn.Parameter], list[tuple[nn.Parameter, Tensor]]]
"""Parameters that are gone, and each new one beside the weight that it came from."""
_Place = tuple[str, int, Role]


def branched_convs(model: nn.Module) -> dict[str, BranchedConv2d]:
    """Those of the model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BranchedConv2d)}


def replay_branches(model: nn.Module, branches: Mapping[str, Branching]) -> None:
    """Let the convolutions of `model` run as `branches`, with weights yet to be loaded. Raises PlanError."""
    modules = dict(model.named_modules())
    for name, branching in branches.items():
        conv = modules.get(name)
        if type(conv) is not nn.Conv2d:
            raise PlanError(f"the model has no convolution {name!r}: the plan is of another model")
        _put(model, name, BranchedConv2d.beside(conv, branching))


@torch.no_grad()
def branch_out(model: nn.Module, branchings: Mapping[str, Branching], seed: int) -> Exchange:
    """Let convolutions of `model` run as branches, in place; what it computes in eval mode stays.

    New kernels are random and small, `point` takes half of the centre tap; the k x k branch is what the
    convolution was, less all of them. Returns the parameters that are gone, and each new one beside the weight
    that it came from.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    convs = {name: modules[name] for name in branchings}
    replay_branches(model, branchings)
    gone: list[nn.Parameter] = []
    new: list[tuple[nn.Parameter, Tensor]] = []
    for name, branched in branched_convs(model).items():
        if name not in convs:
            continue
        conv = convs[name]
        assert isinstance(conv, nn.Conv2d)
        rest = conv.weight.double()
        for kind, branch in branched.branches.items():
            if kind != "kernel":
                _start(kind, branch, conv.weight, generator)
                rest = rest - branch.merged()[0].to(rest)
        branched.branches["kernel"].conv.weight.copy_(rest)
        gone.append(cast("nn.Parameter", conv.weight))
        new += [(parameter, conv.weight) for parameter in branched.parameters() if parameter is not conv.bias]
    return gone, new


def _start(kind: str, branch: Branch, weight: Tensor, generator: torch.Generator) -> None:
    centre = weight.shape[-1] // 2
    if kind == "point":
        branch.conv.weight.copy_(HALF * weight[:, :, centre : centre + 1, centre : centre + 1])
        return
    for conv in (*branch.reads(), branch.conv):
        if conv.weight.requires_grad:
            noise = torch.randn(conv.weight.shape, generator=generator) / conv.weight[0].numel() ** 0.5
            conv.weight.copy_(noise)
    found = branch.raw_kernel()[0].flatten(1).norm(dim=1)
    wanted = SHARE * weight.double().flatten(1).norm(dim=1).to(found)
    ratio = wanted / found.clamp(min=1e-12)
    if kind == "identity":  # its kernel stays as it is: the norm has the scale
        branch.norm.weight.mul_(ratio.to(branch.norm.weight))
    else:
        branch.conv.weight.mul_(ratio.to(branch.conv.weight)[:, None, None, None])


@torch.no_grad()
def settle_norms(model: nn.Module, names: Collection[str], batches: Iterable[Batch]) -> None:
    """Gives the norms of new branches the statistics of what they see, with scale and shift to undo them.

    What the model computes in eval mode stays; in training, where norms use the statistics of a batch, it then
    is nearly so as well.
    """
    found = branched_convs(model)
    norms = [norm for name in names for branch in found[name].branches.values() for norm in branch.norms]
    sums: dict[nn.Module, list[Tensor]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        here = [x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_tensor(float(x[:, 0].numel()))]
        sums[module] = [a + b for a, b in zip(sums[module], here, strict=True)] if module in sums else here

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        with measuring(model):
            for batch in batches:
                model(images_of(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    for norm in norms:
        total, squares, count = sums[norm]
        mean = total / count
        _restate(norm, mean, (squares / count - mean.square()).clamp(min=0))


def _restate(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Gives `norm` other statistics, with scale and shift that leave what it computes in eval mode."""
    scale, shift = affine(norm)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(scale * torch.sqrt(norm.running_var.double() + norm.eps))
    norm.bias.copy_(shift + scale * norm.running_mean.double())


@torch.no_grad()
def merge_branches(model: nn.Module) -> Exchange:
    """Puts convolutions in the place of all branches, in place. Returns as `branch_out` does."""
    modules = dict(model.named_modules())
    gone: list[nn.Parameter] = []
    new: list[tuple[nn.Parameter, Tensor]] = []
    for name, branched in branched_convs(model).items():
        conv, constant = branched.merged()
        if branched.bias is None and branched.norm_path is not None:
            mean = modules[branched.norm_path].running_mean
            assert isinstance(mean, Tensor)
            mean.copy_(mean.double() - constant)
        old = next(iter(branched.branches.values())).conv.weight
        gone += list(branched.parameters())
        new += [(parameter, old) for parameter in conv.parameters()]
        _put(model, name, conv)
    return gone, new


def drop_branches(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Takes the branches `names` ("layer1.conv.pool") out, in place; returns the parameters that are gone."""
    gone: list[nn.Parameter] = []
    for name in names:
        home, _, kind = name.rpartition(".")
        branched = model.get_submodule(home)
        assert isinstance(branched, BranchedConv2d)
        gone += list(branched.branches[kind].parameters())
        del branched._modules[kind]
    return gone


@torch.no_grad()
def scale_branches(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiplies what branches add, in place."""
    for name, factor in factors.items():
        norm = model.get_submodule(name).norm
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    home, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(home), attribute, module)


def branched_graph(graph: ChannelGraph, model: nn.Module) -> ChannelGraph:
    """`graph`, the one of the merged model, with the tensors of the branches that `model` runs as: its wiring.

    What wrote the convolution's outputs writes those of every branch, what it read every branch reads. Costs
    stay those of the merged kernels. Each branch is a block.
    """
    found = branched_convs(model)
    if not found:
        return graph
    stands: dict[tuple[str, int], list[_Place]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    blocks, tensors_of = [], {}
    for name, branched in found.items():
        mine: set[str] = set()
        for kind, branch in branched.branches.items():
            path = f"{name}.{kind}"
            state = {f"{path}.{n}": t for n, t in (*branch.named_parameters(), *branch.named_buffers())}
            paths = {module: f"{path}.{n}" for n, module in branch.named_modules()}
            stands.setdefault((f"{name}.weight", 0), []).append((f"{paths[branch.conv]}.weight", 0, "writes"))
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                stands[f"{name}.weight", 0].append((f"{path}.norm.{tensor}", 0, "scales"))
            for conv in branch.reads():
                stands.setdefault((f"{name}.weight", 1), []).append((f"{paths[conv]}.weight", 1, "reads"))
            shapes.update((n, tuple(t.shape)) for n, t in state.items())
            mine |= state.keys()
            blocks.append(Block(path, frozenset(state), frozenset(), of=name))
        tensors_of[f"{name}.weight"] = mine
    return _substituted(graph, stands, shapes, tensors_of, blocks)


def _substituted(
    graph: ChannelGraph,
    stands: Mapping[tuple[str, int], list[_Place]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors_of: Mapping[str, set[str]],
    branches: list[Block],
) -> ChannelGraph:
    groups = []
    for group in graph.groups.values():
        slices: list[Slice] = []
        for piece in group.slices:
            for tensor, axis, role in stands.get(
                (piece.tensor, piece.axis), [(piece.tensor, piece.axis, piece.role)]
            ):
                slices.append(Slice(tensor, axis, role, piece.unit_of))
        groups.append(replace(group, slices=tuple(slices)))
    order: dict[str, tuple[int, ...]] = {}
    for tensor, shape in graph.tensors.items():
        if tensor in tensors_of:
            order.update((n, shapes[n]) for n, _, _ in (*stands[tensor, 0], *stands[tensor, 1]))
        else:
            order[tensor] = shape
    residual = []
    for block in graph.blocks.values():
        inside = set().union(*(tensors_of.get(tensor, {tensor}) for tensor in block.tensors))
        residual.append(Block(block.name, frozenset(inside), block.sources | (block.tensors - inside)))
    return ChannelGraph(groups, graph.terms, order, [*residual, *branches], ())


def with_branches(graph: ChannelGraph, wiring: ChannelGraph) -> ChannelGraph:
    """`graph`, the one of the merged model, with the branches of `wiring` as blocks: what methods see."""
    branches = [block for block in wiring.blocks.values() if block.of is not None]
    return ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, [*graph.blocks.values(), *branches])


def extra_macs(model: nn.Module, args: tuple[Any, ...]) -> float:
    """MACs of one forward pass of one image, `args`, that branches take and their merged kernels would not."""
    total = 0

    def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, BranchedConv2d)
        (_, _, *into), (_, _, *out) = layer_input(args, kwargs).shape, output.shape
        total += module.extra_macs((into[0], into[1]), (out[0], out[1]))

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in branched_convs(model).values()]
    if not handles:
        return 0.0
    try:
        with torch.no_grad(), evaluating(model):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return float(total)


def verify_merge(branched: nn.Module, merged: nn.Module, args: tuple[Any, ...]) -> Verification:
    """Branches against the merged model, both in eval mode. Raises VerificationError."""
    with torch.no_grad(), evaluating(branched, merged):
        worst = distance(merged(*args), branched(*args))
    problem = "the merged model is not the one with branches"
    return verified(worst, problem, "Use expansion=none, or report the model")
