"""Normalisation whose statistics run over gated units, taken over what the gates leave.

A layer norm over C channels of which some are gated to zero is not the layer norm of the smaller model:
its mean and variance still see the gated ones. With every channel weighted by its gate it is, exactly,
for gates of zero and one; between them it is smooth in the gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from prunus.adapters.pytorch.interception import Answer, BatchNormCall, Interception

STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
"""Convolutions that standardise their weight over its inputs: gates act after that, not on the parameter."""


class GatedStatistics(Interception):
    """While active, norms with a gated affine weight take gate-weighted statistics.

    Norms are recognised by their weight, wherever it is used; a norm without one cannot be recognised.
    """

    def __init__(self, norms: Mapping[int, Tensor], standardised: Mapping[nn.Module, Tensor]) -> None:
        """`norms`: id of an affine weight -> gates of its shape. `standardised`: convolution -> gates
        broadcastable against its weight."""
        super().__init__(
            {
                F.layer_norm: self._layer_norm,
                F.rms_norm: self._rms_norm,
                F.group_norm: self._group_norm,
                F.batch_norm: self._standardise,
                Tensor.mean: self._response,
            }
        )
        self._norms = norms
        self._standardised = standardised
        self._inside: nn.Module | None = None
        self.seen: set[int] = set()
        """The weights that a norm has used so far."""

    def hooks(self, model: nn.Module) -> Iterable[torch.utils.hooks.RemovableHandle]:
        """Hooks that tell which standardised convolution or response norm is running; the caller removes them."""

        def enter(module: nn.Module, args: object) -> None:
            self._inside = module

        def leave(module: nn.Module, args: object, output: object) -> None:
            self._inside = None

        responses = [
            m for m in model.modules() if isinstance(m, GlobalResponseNorm) and id(m.weight) in self._norms
        ]
        for module in (*self._standardised, *responses):
            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave, always_call=True)

    def _gate(self, weight: Tensor | None, like: Tensor) -> Tensor | None:
        if weight is None or id(weight) not in self._norms:
            return None
        self.seen.add(id(weight))
        return self._norms[id(weight)].to(like)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Answer:
        x = _wide(input)
        gate = self._gate(weight, x)
        if gate is None or weight is None:
            return NotImplemented
        axes = list(range(-len(normalized_shape), 0))
        total = _nonzero(gate.sum())
        mean = (x * gate).sum(axes, keepdim=True) / total
        centred = x - mean
        variance = (centred.square() * gate).sum(axes, keepdim=True) / total
        result = centred * torch.rsqrt(variance + eps) * weight
        return (result if bias is None else result + bias).to(input.dtype)

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Answer:
        x = _wide(input)
        gate = self._gate(weight, x)
        if gate is None or weight is None:
            return NotImplemented
        axes = list(range(-len(normalized_shape), 0))
        power = (x.square() * gate).sum(axes, keepdim=True) / _nonzero(gate.sum())
        small = torch.finfo(x.dtype).eps if eps is None else eps
        return (x * torch.rsqrt(power + small) * weight).to(input.dtype)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Answer:
        x = _wide(input)
        gate = self._gate(weight, x)
        if gate is None or weight is None:
            return NotImplemented
        slots = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, -1)
        share = gate.view(1, num_groups, -1, 1)
        total = _nonzero(share.sum(2, keepdim=True)) * slots.shape[-1]
        mean = (slots * share).sum((2, 3), keepdim=True) / total
        centred = slots - mean
        variance = (centred.square() * share).sum((2, 3), keepdim=True) / total
        result = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        result = result * weight.view(shape)
        return (result if bias is None else result + bias.view(shape)).to(input.dtype)

    def _standardise(self, *args: Any, **kwargs: Any) -> Answer:
        call, module = BatchNormCall(*args, **kwargs), self._inside
        if module is None or module not in self._standardised or call.running_mean is not None:
            return NotImplemented
        x = call.input
        gate = self._standardised[module].expand(module.weight.shape).reshape(x.shape).to(x)  # type: ignore[arg-type]
        total = _nonzero(gate.sum(2, keepdim=True))
        mean = (x * gate).sum(2, keepdim=True) / total
        centred = x - mean
        variance = (centred.square() * gate).sum(2, keepdim=True) / total
        result = centred * torch.rsqrt(variance + call.eps) * gate
        return result if call.weight is None else result * call.weight.view(1, -1, 1)

    def _response(self, input: Tensor, *args: Any, dim: int | None = None, keepdim: bool = False) -> Answer:
        """The mean over channels inside a global response norm (ConvNeXt V2, Woo et al. 2023)."""
        module = self._inside
        if not isinstance(module, GlobalResponseNorm) or dim != module.channel_dim or args:
            return NotImplemented
        gate = self._gate(module.weight, input)
        if gate is None:
            return NotImplemented
        share = gate.view(module.wb_shape)
        return (input * share).sum(dim, keepdim=keepdim) / _nonzero(gate.sum())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _nonzero(total: Tensor) -> Tensor:
    """Everything gated away: any finite statistics do, since nobody reads the result."""
    return total.clamp(min=1e-12)
