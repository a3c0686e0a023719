"""A convolution as a sum of parallel linear branches, each with its own batch norm, and back again.

    kernel      k x k
    squeeze     1 x 1, norm, k x k
    point       1 x 1
    pool        average over k x k, 1 x 1
    identity    what comes in, where shapes allow

Each branch ends in its norm. In eval mode every branch is one linear map of a k x k neighbourhood, so that their
sum is one convolution again (Ding et al., Diverse Branch Block, CVPR 2021; RepVGG, CVPR 2021). Where zeros are
padded, a 1 x 1 convolution and its norm come after the padding: the constant that the norm adds is then at the
border, too, and merging is exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.core.errors import PlanError
from prunus.core.plan import Branching

KINDS = ("kernel", "squeeze", "point", "pool", "identity")
SEEING_ONE_TAP = frozenset({"point", "identity"})
"""Kinds whose kernel is 1 x 1."""


Size = tuple[int, int]
"""Height and width of a map."""


class Branch(nn.Module):
    """One linear branch, and the norm that ends it."""

    norm: nn.BatchNorm2d
    conv: nn.Conv2d
    """What makes the outputs."""

    def __init__(self, size: int, stride: tuple[int, int], outputs: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.norm = identity_norm(outputs)

    def linear(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W'), without the norm."""
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))

    def raw_kernel(self) -> tuple[Tensor, Tensor]:
        """The (O, I, k, k) kernel and (O,) constant of `linear`, in float64."""
        weight = self.conv.weight.double()
        margin = (self.size - weight.shape[-1]) // 2
        return F.pad(weight, (margin,) * 4), weight.new_zeros(len(weight))

    def merged(self) -> tuple[Tensor, Tensor]:
        """The kernel and constant of the whole branch in eval mode."""
        kernel, constant = self.raw_kernel()
        scale, shift = affine(self.norm)
        return kernel * scale[:, None, None, None], constant * scale + shift

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return (self.norm,)

    def reads(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions that take the input."""
        return (self.conv,)

    def forward_macs(self, size_in: Size, size_out: Size) -> int:
        """Of one image, (H, W) and (H', W')."""
        return self.conv.weight.numel() * prod(size_out)


class KernelBranch(Branch):
    """k x k."""

    def __init__(self, size: int, stride: tuple[int, int], inputs: int, outputs: int) -> None:
        super().__init__(size, stride, outputs)
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class PointBranch(Branch):
    """1 x 1."""

    def __init__(self, size: int, stride: tuple[int, int], inputs: int, outputs: int) -> None:
        super().__init__(size, stride, outputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class IdentityBranch(PointBranch):
    """What comes in, output by output: a 1 x 1 kernel of ones and zeros that does not train.

    As a kernel it goes on being right when inputs and outputs are removed independently of each other.
    """

    def __init__(self, size: int, stride: tuple[int, int], inputs: int, outputs: int) -> None:
        super().__init__(size, stride, inputs, outputs)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(outputs, inputs)[:, :, None, None])
        self.conv.weight.requires_grad_(False)


class PoolBranch(PointBranch):
    """Average over k x k, zeros of the padding counted, then 1 x 1."""

    def __init__(self, size: int, stride: tuple[int, int], inputs: int, outputs: int) -> None:
        super().__init__(size, (1, 1), inputs, outputs)
        self.pool_stride = stride

    def linear(self, x: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(x, self.size, self.pool_stride, self.size // 2))

    def raw_kernel(self) -> tuple[Tensor, Tensor]:
        weight = self.conv.weight.double()
        return weight.expand(-1, -1, self.size, self.size) / self.size**2, weight.new_zeros(len(weight))


class SqueezeBranch(Branch):
    """1 x 1, norm, k x k."""

    def __init__(self, size: int, stride: tuple[int, int], inputs: int, outputs: int, inner: int) -> None:
        super().__init__(size, stride, outputs)
        self.first = nn.Conv2d(inputs, inner, 1, bias=False)
        self.first_norm = identity_norm(inner)
        self.conv = nn.Conv2d(inner, outputs, size, stride, bias=False)

    def linear(self, x: Tensor) -> Tensor:
        return self.conv(self.first_norm(self.first(F.pad(x, (self.size // 2,) * 4))))

    def raw_kernel(self) -> tuple[Tensor, Tensor]:
        scale, shift = affine(self.first_norm)
        outer, inner = self.conv.weight.double(), self.first.weight.double()[:, :, 0, 0] * scale[:, None]
        return torch.einsum("omhw,mi->oihw", outer, inner), (outer.sum((2, 3)) * shift).sum(1)

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return (self.first_norm, self.norm)

    def reads(self) -> tuple[nn.Conv2d, ...]:
        return (self.first,)

    def forward_macs(self, size_in: Size, size_out: Size) -> int:
        padded = prod(side + 2 * (self.size // 2) for side in size_in)
        return self.first.weight.numel() * padded + super().forward_macs(size_in, size_out)


def identity_norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm that changes nothing in eval mode."""
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.weight, (1.0 + norm.eps) ** 0.5)  # a fresh norm's variance is 1
    return norm


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, float64."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


class BranchedConv2d(nn.Module):
    """Stands where an `nn.Conv2d` was; its branches are its children, by their kind."""

    bias: nn.Parameter | None

    def __init__(self, size: int, stride: tuple[int, int], bias: nn.Parameter | None, norm: str | None) -> None:
        """`bias` is that of the convolution; `norm` the batch norm that follows, if there is no bias."""
        super().__init__()
        self.size, self.stride, self.norm_path = size, stride, norm
        self.register_parameter("bias", bias)

    @classmethod
    def beside(cls, conv: nn.Conv2d, branching: Branching) -> BranchedConv2d:
        """The branches of `branching` with weights yet to come, in the place of `conv`."""
        size, stride = conv.kernel_size[0], (conv.stride[0], conv.stride[1])
        branched = cls(size, stride, cast("nn.Parameter | None", conv.bias), branching.norm)
        shape = (size, stride, conv.in_channels, conv.out_channels)
        for kind in branching.kinds:
            if kind == "squeeze":
                branch: Branch = SqueezeBranch(*shape, branching.inner)
            elif kind in _SIMPLE:
                branch = _SIMPLE[kind](*shape)
            else:
                raise PlanError(f"there are no branches of the kind {kind!r}; there are {', '.join(KINDS)}")
            branched.add_module(kind, branch)
        return branched.to(conv.weight).train(conv.training)

    @property
    def branches(self) -> dict[str, Branch]:
        return {name: module for name, module in self.named_children() if isinstance(module, Branch)}

    @property
    def branching(self) -> Branching:
        branches = self.branches
        squeeze = branches.get("squeeze")
        inner = squeeze.first.out_channels if isinstance(squeeze, SqueezeBranch) else 0
        return Branching(kinds=list(branches), inner=inner, norm=self.norm_path)

    @property
    def merged_size(self) -> int:
        """Side of the merged kernel: 1 if no branch sees more."""
        return 1 if self.branches.keys() <= SEEING_ONE_TAP else self.size

    def extra_macs(self, size_in: Size, size_out: Size) -> int:
        """MACs of one image that the branches take and the merged kernel would not."""
        branches = self.branches.values()
        taken = sum(branch.forward_macs(size_in, size_out) for branch in branches)
        first = next(iter(branches))
        merged = len(first.conv.weight) * first.reads()[0].in_channels * self.merged_size**2
        return taken - merged * prod(size_out)

    def forward(self, input: Tensor) -> Tensor:
        total: Tensor | None = None
        for branch in self.branches.values():
            y = branch(input)
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None else total + self.bias[:, None, None]

    @torch.no_grad()
    def merged(self) -> tuple[nn.Conv2d, Tensor]:
        """The convolution that does the same in eval mode, and the (O,) constant it has no bias for (else 0)."""
        parts = [branch.merged() for branch in self.branches.values()]
        kernel = torch.stack([kernel for kernel, _ in parts]).sum(0)
        constant = torch.stack([constant for _, constant in parts]).sum(0)
        size, margin = self.merged_size, (self.size - self.merged_size) // 2
        kernel = kernel[:, :, margin : margin + size, margin : margin + size]
        like = next(iter(self.branches.values())).conv.weight
        conv = nn.Conv2d(
            kernel.shape[1], kernel.shape[0], size, self.stride, size // 2, bias=self.bias is not None
        ).to(like)
        conv.weight.copy_(kernel)
        if conv.bias is not None and self.bias is not None:
            conv.bias.copy_(self.bias.double() + constant)
            constant = torch.zeros_like(constant)
        return conv.train(self.training), constant


_SIMPLE: Mapping[str, Callable[[int, tuple[int, int], int, int], Branch]] = {
    "kernel": KernelBranch,
    "point": PointBranch,
    "pool": PoolBranch,
    "identity": IdentityBranch,
}
