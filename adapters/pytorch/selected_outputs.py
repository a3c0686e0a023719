"""Outputs of models that select by value (detection), made comparable.

A selection (top-k, non-maximum suppression) may order equal scores either way, and a model that finds
nothing answers with nothing, whatever its weights do. So rows are put into a canonical order, and what the
layers compute on the way is compared as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

DIGITS = 5
"""Scores that agree to so many digits count as equal when rows are ordered."""


def ordered(output: Any) -> Any:
    """`output` with the detections of each image sorted by score, then by every other value."""
    if isinstance(output, dict) and isinstance(output.get("scores"), Tensor):
        return _rows_ordered(output)
    if isinstance(output, dict):
        return {key: ordered(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [ordered(item) for item in output]
    return output


def _rows_ordered(found: dict[str, Any]) -> dict[str, Any]:
    scores = found["scores"]
    if not len(scores):
        return found
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor) and v.shape[:1] == scores.shape[:1]}
    columns = [v.reshape(len(scores), -1).double() for k, v in tensors.items() if k != "scores" and v.dim() <= 2]
    keys = torch.cat([*columns, -scores[:, None].double()], dim=1).cpu().numpy()
    order = torch.from_numpy(np.lexsort(np.round(keys, DIGITS).T)).to(scores.device)
    return {key: value[order] if key in tensors else value for key, value in found.items()}


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what every convolution and linear layer computes inside the block, by path and call.

    Each is averaged over its first axis (images, or proposals in no certain order).
    """
    seen: dict[str, Tensor] = {}
    hooks = []

    def record(path: str, output: Tensor) -> None:
        calls = sum(key.startswith(f"{path}/") for key in seen)
        seen[f"{path}/{calls}"] = output.detach().mean(dim=0) if len(output) else output.detach()

    for path, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            hooks.append(module.register_forward_hook(lambda m, i, o, path=path: record(path, o)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def shared(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The entries that both have in the same shape: layers whose outputs nothing was removed from."""
    both = [key for key in a if key in b and a[key].shape == b[key].shape]
    return [a[key] for key in both], [b[key] for key in both]
