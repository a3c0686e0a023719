"""Forwards for torch's and torchvision's attention classes, see `handlers`.

torchvision's swin is the dangerous one: its free function recomputes the softmax scale from
`C // num_heads`, so that after a removal it would run and be wrong. Here the scale is stored once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus.adapters.pytorch.handlers import handles


@handles("torchvision.models.maxvit.RelativePositionalMultiHeadAttention")
def _maxvit(self: Any, x: Tensor) -> Tensor:
    batch, groups, tokens = x.shape[:3]
    qkv = self.to_qkv(x).reshape(batch, groups, tokens, 3, self.n_heads, -1)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
    scores = q @ (k * self.scale_factor).transpose(-2, -1)
    scores = F.softmax(scores + self.get_relative_positional_bias(), dim=-1)
    return self.merge((scores @ v).transpose(2, 3).flatten(3))


def _store_swin_scale(attention: Any) -> None:
    attention.scale = (attention.qkv.in_features // attention.num_heads) ** -0.5


def _window_mask(like: Tensor, size: tuple[int, int], window: list[int], shift: list[int]) -> Tensor:
    """(windows, N, N): -100 between tokens that only the cyclic shift brought into one window."""
    regions = like.new_zeros(size)
    count = 0
    for top in ((0, -window[0]), (-window[0], -shift[0]), (-shift[0], None)):
        for left in ((0, -window[1]), (-window[1], -shift[1]), (-shift[1], None)):
            regions[top[0] : top[1], left[0] : left[1]] = count
            count += 1
    regions = regions.view(size[0] // window[0], window[0], size[1] // window[1], window[1])
    regions = regions.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    difference = regions.unsqueeze(1) - regions.unsqueeze(2)
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


def _qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bias = attention.qkv.bias
    if hasattr(attention, "logit_scale") and bias is not None:  # Swin V2: the keys have no bias
        query, key, value = bias.chunk(3)
        bias = torch.cat((query, torch.zeros_like(key), value))
    qkv = F.linear(x, attention.qkv.weight, bias)
    qkv = qkv.reshape(x.shape[0], x.shape[1], 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@handles(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    prepare=_store_swin_scale,
)
def _shifted_window(self: Any, x: Tensor) -> Tensor:
    (batch, height, width, _), window = x.shape, self.window_size
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    full = (x.shape[1], x.shape[2])
    rows, columns = full[0] // window[0], full[1] // window[1]
    shift = [0 if window[i] >= full[i] else self.shift_size[i] for i in range(2)]
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = x.reshape(batch, rows, window[0], columns, window[1], -1).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch * rows * columns, window[0] * window[1], -1)

    q, k, v = _qkv(self, x)
    if hasattr(self, "logit_scale"):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=4.605170185988092).exp()  # log(100)
    else:
        scores = (q * self.scale) @ k.transpose(-2, -1)
    scores = scores + self.get_relative_position_bias()
    if sum(shift) > 0:
        mask = _window_mask(x, full, window, shift)
        scores = scores.unflatten(0, (batch, -1)) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.flatten(0, 1)
    scores = F.dropout(scores.softmax(dim=-1), p=self.attention_dropout, training=self.training)

    x = F.linear((scores @ v).transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
    x = F.dropout(x, p=self.dropout, training=self.training)
    x = x.reshape(batch, rows, columns, window[0], window[1], -1).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, full[0], full[1], -1)
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
    return x[:, :height, :width, :].contiguous()


@handles("torchvision.models.video.swin_transformer.ShiftedWindowAttention3d", prepare=_store_swin_scale)
def _shifted_window_3d(self: Any, x: Tensor) -> Tensor:
    from torchvision.models.video.swin_transformer import _compute_attention_mask_3d, _get_window_and_shift_size

    batch, *size = x.shape[:4]
    window, shift = _get_window_and_shift_size(self.shift_size.copy(), size, self.window_size.copy())
    pads = [-length % step for length, step in zip(size, window, strict=True)]
    x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
    full = tuple(x.shape[1:4])
    cells = [length // step for length, step in zip(full, window, strict=True)]
    if sum(shift) > 0:
        x = torch.roll(x, shifts=tuple(-step for step in shift), dims=(1, 2, 3))
    x = x.reshape(batch, cells[0], window[0], cells[1], window[1], cells[2], window[2], -1)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch * math.prod(cells), math.prod(window), -1)

    q, k, v = _qkv(self, x)
    scores = (q * self.scale) @ k.transpose(-2, -1) + self.get_relative_position_bias(window)
    if sum(shift) > 0:
        mask = _compute_attention_mask_3d(x, full, tuple(window), tuple(shift))
        scores = (scores.unflatten(0, (batch, -1)) + mask.unsqueeze(1).unsqueeze(0)).flatten(0, 1)
    scores = F.dropout(scores.softmax(dim=-1), p=self.attention_dropout, training=self.training)

    x = F.linear((scores @ v).transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
    x = F.dropout(x, p=self.dropout, training=self.training)
    x = x.reshape(batch, *cells, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(batch, *full, -1)
    if sum(shift) > 0:
        x = torch.roll(x, shifts=tuple(shift), dims=(1, 2, 3))
    return x[:, : size[0], : size[1], : size[2], :].contiguous()


def _store_correlated_channels(flow: Any) -> None:
    flow.correlated_channels = flow.feature_encoder.conv.out_channels


@handles("torchvision.models.optical_flow.raft.RAFT", prepare=_store_correlated_channels)
def _raft(self: Any, image1: Tensor, image2: Tensor, num_flow_updates: int = 12) -> list[Tensor]:
    """The correlation is divided by the root of the width that the features happen to have: put right here."""
    from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

    if image1.shape[-2:] != image2.shape[-2:] or image1.shape[-2] % 8 or image1.shape[-1] % 8:
        raise ValueError(
            "both images must have one size, divisible by 8, "
            f"got {tuple(image1.shape[-2:])} and {tuple(image2.shape[-2:])}"
        )
    first, second = self.feature_encoder(torch.cat([image1, image2], dim=0)).chunk(2, dim=0)
    share = (first.shape[1] / self.correlated_channels) ** 0.25
    self.corr_block.build_pyramid(first * share, second * share)

    context = self.context_encoder(image1)
    width = self.update_block.hidden_state_size
    state, context = context.split([width, context.shape[1] - width], dim=1)
    state, context = state.tanh(), context.relu()

    start = make_coords_grid(image1.shape[0], image1.shape[-2] // 8, image1.shape[-1] // 8).to(first.device)
    place, flows = start, []
    for _ in range(num_flow_updates):
        place = place.detach()  # no gradient through this branch, as in the paper
        correlated = self.corr_block.index_pyramid(centroids_coords=place)
        state, step = self.update_block(state, context, correlated, place - start)
        place = place + step
        mask = None if self.mask_predictor is None else self.mask_predictor(state)
        flows.append(upsample_flow(flow=place - start, up_mask=mask))
    return flows


def _store_scale(attention: Any) -> None:
    attention.scale = attention.head_dim**-0.5


def _packed(attention: Any) -> bool:
    return attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of torch's two kinds (True hides, or added) as one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


@handles("torch.nn.modules.activation.MultiheadAttention", prepare=_store_scale, fits=_packed)
def _multihead(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's own function insists on heads that fill the stream; this one reads widths off its weights."""
    batched = query.dim() == 3
    inputs = [query, key, value]
    if not batched:
        inputs = [t.unsqueeze(0) for t in inputs]
    elif not self.batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    batch, tokens = inputs[0].shape[:2]
    if query is key and key is value:
        packed = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(t, w, b).reshape(batch, t.shape[1], self.num_heads, -1).transpose(1, 2)
            for t, w, b in zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)
        )
    mask = _additive(attn_mask, q)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, -1))
    padding = _additive(key_padding_mask, q)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    weights = None
    dropout = self.dropout if self.training else 0.0
    if need_weights:
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        out = F.dropout(weights, p=dropout) @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    if not batched:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return out if self.batch_first else out.transpose(0, 1), weights
