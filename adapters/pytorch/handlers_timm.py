"""Forwards for timm's attention classes that take the width of the heads from the width of the stream.

Each is timm's own computation (Apache-2.0, timm 1.0.31) with the one change named in `handlers`: widths
come from the projected tensors. B batch, N tokens, H heads, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus.adapters.pytorch.handlers import handles


def _split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts*H*D) -> `parts` tensors (B, H, N, D)."""
    batch, tokens = projected.shape[:2]
    return projected.reshape(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + mask) v, fused where the module says so; the scale stays the trained one."""
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attention.scale)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return attention.attn_drop(scores.softmax(dim=-1)) @ v


def _project(attention: Any, heads_out: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, C) through the module's output projection."""
    return attention.proj_drop(attention.proj(heads_out.transpose(1, 2).flatten(2)))


def _biased_qkv(attention: Any, x: Tensor) -> Tensor:
    """The fused projection of BEiT, EVA and Swin V2: biases of q, k and v are separate tensors."""
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:
        return attention.qkv(x) + bias
    return F.linear(x, weight=attention.qkv.weight, bias=bias)


@handles("timm.models.metaformer.Attention")
def _self_attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    return _project(self, _attend(self, q, k, v))


@handles("timm.models.fastvit.Attention")
def _fastvit(self: Any, x: Tensor) -> Tensor:
    out = _self_attention(self, x.flatten(2).transpose(-2, -1))
    return out.transpose(-2, -1).reshape(x.shape[0], -1, *x.shape[2:])


@handles("timm.models.vision_transformer_relpos.RelPosAttention")
def _relative(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    bias = self.rel_pos.get_bias() if self.rel_pos is not None else shared_rel_pos
    return _project(self, _attend(self, self.q_norm(q), self.k_norm(k), v, bias))


@handles("timm.models.eva.EvaAttention")
def _eva(
    self: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    from timm.layers import apply_rot_embed_cat
    from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask

    gate = self.gate(x).sigmoid() if self.gate is not None else None
    if self.qkv is not None:
        q, k, v = _split(_biased_qkv(self, x), 3, self.num_heads)
    else:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (_split(projection(x), 1, self.num_heads)[0] for projection in projections)
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], dim=2).type_as(v)
            for t in (q, k)
        )
    if self.fused_attn:
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
    else:
        scores = (q * self.scale) @ k.transpose(-2, -1)
        mask = resolve_self_attn_mask(x.shape[1], scores, attn_mask, is_causal=is_causal)
        x = self.attn_drop(maybe_add_mask(scores, mask).softmax(dim=-1)) @ v
    x = self.norm(x.transpose(1, 2).flatten(2))
    if gate is not None:
        x = x * gate
    return self.proj_drop(self.proj(x))


@handles("timm.models.beit.Attention")
def _beit(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    q, k, v = _split(_biased_qkv(self, x), 3, self.num_heads)
    bias = shared_rel_pos_bias
    if self.relative_position_bias_table is not None:
        bias = self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias
    return _project(self, _attend(self, q, k, v, bias))


@handles("timm.models.cait.ClassAttn")
def _class_attention(self: Any, x: Tensor) -> Tensor:
    (q,) = _split(self.q(x[:, 0]).unsqueeze(1), 1, self.num_heads)
    (k,), (v,) = _split(self.k(x), 1, self.num_heads), _split(self.v(x), 1, self.num_heads)
    return _project(self, _attend(self, q, k, v))


@handles("timm.models.cait.TalkingHeadAttn")
def _talking_heads(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    scores = (q * self.scale) @ k.transpose(-2, -1)
    scores = self.proj_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
    scores = self.proj_w(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return _project(self, self.attn_drop(scores) @ v)


@handles("timm.models.crossvit.CrossAttention")
def _cross_attention(self: Any, x: Tensor) -> Tensor:
    (q,) = _split(self.wq(x[:, 0:1]), 1, self.num_heads)
    (k,), (v,) = _split(self.wk(x), 1, self.num_heads), _split(self.wv(x), 1, self.num_heads)
    scores = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
    return _project(self, self.attn_drop(scores) @ v)


@handles("timm.models.convit.MHSA")
def _unfused(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    scores = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
    return _project(self, self.attn_drop(scores) @ v)


@handles("timm.models.convit.GPSA")
def _gated_positional(self: Any, x: Tensor) -> Tensor:
    batch, tokens = x.shape[:2]
    if self.rel_indices is None or self.rel_indices.shape[1] != tokens:
        self.rel_indices = self.get_rel_indices(tokens)
    q, k = _split(self.qk(x), 2, self.num_heads)
    (v,) = _split(self.v(x), 1, self.num_heads)
    positions = self.pos_proj(self.rel_indices.expand(batch, -1, -1, -1)).permute(0, 3, 1, 2).softmax(dim=-1)
    content = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
    gate = torch.sigmoid(self.gating_param.view(1, -1, 1, 1))
    scores = (1.0 - gate) * content + gate * positions
    scores = scores / scores.sum(dim=-1).unsqueeze(-1)
    return _project(self, self.attn_drop(scores) @ v)


@handles("timm.models.xcit.XCA")
def _cross_covariance(self: Any, x: Tensor) -> Tensor:
    q, k, v = (t.transpose(-2, -1) for t in _split(self.qkv(x), 3, self.num_heads))  # (B, H, D, N)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if self.fused_attn:
        out = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=1.0)
    else:
        out = self.attn_drop((q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)) @ v
    return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).flatten(2)))


@handles("timm.models.edgenext.CrossCovarianceAttn")
def _cross_covariance_unfused(self: Any, x: Tensor) -> Tensor:
    q, k, v = (t.transpose(-2, -1) for t in _split(self.qkv(x), 3, self.num_heads))
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * self.temperature
    out = self.attn_drop(scores.softmax(dim=-1)) @ v
    return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).flatten(2)))


@handles("timm.models.pvt_v2.Attention")
def _spatially_reduced(self: Any, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
    (q,) = _split(self.q(x), 1, self.num_heads)
    if self.sr is not None:
        x = x.transpose(1, 2).unflatten(2, (feat_size[0], feat_size[1]))
        x = x if self.pool is None else self.pool(x)
        x = self.norm(self.sr(x).flatten(2).transpose(1, 2))
        x = x if self.act is None else self.act(x)
    k, v = _split(self.kv(x), 2, self.num_heads)
    return _project(self, _attend(self, q, k, v))


@handles("timm.models.twins.GlobalSubSampleAttn")
def _subsampled(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    (q,) = _split(self.q(x), 1, self.num_heads)
    if self.sr is not None:
        x = x.transpose(1, 2).unflatten(2, (size[0], size[1]))
        x = self.norm(self.sr(x).flatten(2).transpose(1, 2))
    k, v = _split(self.kv(x), 2, self.num_heads)
    return _project(self, _attend(self, q, k, v))


@handles("timm.models.twins.LocallyGroupedAttn")
def _locally_grouped(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    (batch, tokens), (height, width), ws = x.shape[:2], size, self.ws
    x = x.unflatten(1, (height, width))
    x = F.pad(x, (0, 0, 0, (ws - width % ws) % ws, 0, (ws - height % ws) % ws))
    rows, columns = x.shape[1] // ws, x.shape[2] // ws
    x = x.reshape(batch, rows, ws, columns, ws, -1).transpose(2, 3)
    qkv = self.qkv(x).reshape(batch, rows * columns, ws * ws, 3, self.num_heads, -1)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
    x = _attend(self, q, k, v).transpose(2, 3).reshape(batch, rows, columns, ws, ws, -1)
    x = x.transpose(2, 3).reshape(batch, rows * ws, columns * ws, -1)[:, :height, :width]
    return self.proj_drop(self.proj(x.reshape(batch, tokens, -1)))


@handles("timm.models.coat.FactorAttnConvRelPosEnc")
def _factorised(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    factor = q @ (k.softmax(dim=2).transpose(-1, -2) @ v)
    return _project(self, self.scale * factor + self.crpe(q, v, size=size))


@handles("timm.models.volo.Attention")
def _volo(self: Any, x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    return _self_attention(self, x.flatten(1, 2)).unflatten(1, (height, width))


@handles("timm.models.volo.OutlookAttention")
def _outlook(self: Any, x: Tensor) -> Tensor:
    batch, height, width, _ = x.shape
    h, w, area = math.ceil(height / self.stride), math.ceil(width / self.stride), self.kernel_size**2
    v = self.unfold(self.v(x).permute(0, 3, 1, 2)).reshape(batch, self.num_heads, -1, area, h * w)
    v = v.permute(0, 1, 4, 3, 2)
    scores = self.attn(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    scores = scores.reshape(batch, h * w, self.num_heads, area, area).permute(0, 2, 1, 3, 4)
    scores = self.attn_drop((scores * self.scale).softmax(dim=-1))
    x = (scores @ v).permute(0, 1, 4, 3, 2).reshape(batch, -1, h * w)
    x = F.fold(x, (height, width), self.kernel_size, padding=self.padding, stride=self.stride)
    return self.proj_drop(self.proj(x.permute(0, 2, 3, 1)))


@handles("timm.models.davit.WindowAttention")
def _davit_window(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    if self.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    else:
        out = self.softmax((q * self.scale) @ k.transpose(-2, -1)) @ v
    return self.proj(out.transpose(1, 2).flatten(2))


@handles("timm.models.davit.ChannelAttention")
def _davit_channel(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    scores = ((k * self.scale).transpose(-1, -2) @ v).softmax(dim=-1)
    return self.proj((scores @ q.transpose(-1, -2)).transpose(-1, -2).transpose(1, 2).flatten(2))


def _store_scale(attention: Any) -> None:
    attention.scale = attention.head_dim**-0.5


@handles("timm.models.davit.ChannelAttentionV2", prepare=_store_scale)
def _davit_channel_v2(self: Any, x: Tensor) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.groups)
    q = q * (x.shape[1] ** -0.5 if self.dynamic_scale else self.scale)
    scores = (q.transpose(-1, -2) @ k).softmax(dim=-1)
    return self.proj((scores @ v.transpose(-1, -2)).transpose(-1, -2).transpose(1, 2).flatten(2))


@handles("timm.models.nest.Attention")
def _nested(self: Any, x: Tensor) -> Tensor:
    batch, blocks, tokens = x.shape[:3]
    qkv = self.qkv(x).reshape(batch, blocks, tokens, 3, self.num_heads, -1)
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)
    x = _attend(self, q, k, v).permute(0, 2, 3, 4, 1).flatten(3)
    return self.proj_drop(self.proj(x))


@handles("timm.models.nextvit.EfficientAttention")
def _nextvit(self: Any, x: Tensor) -> Tensor:
    (q,) = _split(self.q(x), 1, self.num_heads)
    if self.sr is not None:
        x = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
    (k,), (v,) = _split(self.k(x), 1, self.num_heads), _split(self.v(x), 1, self.num_heads)
    return _project(self, _attend(self, q, k, v))


@handles("timm.models.cpubone.ConvAttention")
def _cpubone(self: Any, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if self.small_kernels and self.att_stride > 1:
        x = F.pad(x, (0, (-width) % self.att_stride, 0, (-height) % self.att_stride))
    x = self.pwise(self.conv_proj(x))
    batch, _, h, w = x.shape
    q, k, v = x.reshape(batch, self.num_heads, -1, h * w).permute(0, 1, 3, 2).chunk(3, dim=3)
    if self.fused_attn:
        values = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    else:
        values = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = self.upsampling(self.o_proj(values.permute(0, 1, 3, 2).reshape(batch, -1, h, w)))
    return out[..., :height, :width]


@handles("timm.models.gcvit.WindowAttentionGlobal")
def _global_window(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    if self.use_global and q_global is not None:
        k, v = _split(self.qkv(x), 2, self.num_heads)
        # Windows are image-major: every window of an image shares the query of that image.
        q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0)
        (q,) = _split(q.reshape(x.shape[0], x.shape[1], -1), 1, self.num_heads)
    else:
        q, k, v = _split(self.qkv(x), 3, self.num_heads)
    scores = self.rel_pos((q * self.scale) @ k.transpose(-2, -1).contiguous())
    return _project(self, self.attn_drop(scores.softmax(dim=-1)) @ v)


def _masked_by_window(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Adds a mask (windows, N, N) to scores (B*windows, H, N, N)."""
    if mask is None:
        return scores
    scores = scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1).unsqueeze(0)
    return scores.flatten(0, 1)


@handles("timm.models.swin_transformer_v2.WindowAttention")
def _swin_v2(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = _split(_biased_qkv(self, x), 3, self.num_heads)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
    area = self.window_size[0] * self.window_size[1]
    table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
    bias = table[self.relative_position_index.view(-1)].unflatten(0, (area, area)).permute(2, 0, 1)
    scores = scores + 16 * torch.sigmoid(bias.contiguous()).unsqueeze(0)
    return _project(self, self.attn_drop(self.softmax(_masked_by_window(scores, mask))) @ v)


@handles("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention")
def _swin_v2_cr(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = _split(self.qkv(x), 3, self.num_heads)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(self.logit_scale.reshape(1, -1, 1, 1), max=math.log(1.0 / 0.01)).exp()
    scores = _masked_by_window(scores + self._relative_positional_encodings(), mask)
    return _project(self, self.attn_drop(scores.softmax(dim=-1)) @ v)
