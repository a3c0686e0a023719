"""Tensors on disk: safetensors only, ties written once, loading strict. Nothing here can execute code."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunus.core.errors import LoadError
from prunus.core.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, atomically. Tensors that share memory must have been reduced to one.

    Raises OSError (disk full) with an old file untouched.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # what the system said, in words
            said = re.search(r"os error (\d+)", str(error))
            if said is None:
                raise
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error

    write_atomically(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of `path` to the CPU. Raises LoadError if it is missing, truncated or not safetensors."""
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as safetensors: {error}") from error


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the `state_dict`, which may hold a module's extra state as well: an object of its own making."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict`, every shared one under its first name only."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    state = {}
    for name, tensor in tensors_of(model).items():
        key = (tensor.data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor
    return state


def refuse_sparse(model: nn.Module) -> None:
    """Raises LoadError for a tensor of the `state_dict` that safetensors cannot hold."""
    for name, tensor in tensors_of(model).items():
        if tensor.layout is not torch.strided:
            raise LoadError(
                f"{name} is a sparse tensor ({tensor.layout}), which cannot be saved; keep it dense or, if it can "
                "be computed anew, register it as a buffer with persistent=False"
            )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    hasher = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = (
            (tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()).cpu().contiguous()
        )
        hasher.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy `tensors` into `model`: every name, shape and dtype must match (shared tensors: one name is enough).

    Raises LoadError that names the first difference; the model is then unchanged.
    """
    own = tensors_of(model)
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise LoadError(f"{origin}: the model has no tensor named {unknown[0]!r}")
    given = {own[name].data_ptr() for name in tensors if own[name].numel()}
    for name, tensor in own.items():
        if name not in tensors:
            if tensor.numel() and tensor.data_ptr() not in given:
                raise LoadError(f"{origin}: the tensor {name!r} is missing")
        elif tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise LoadError(
                f"{origin}: {name!r} is {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                f"the model has {tuple(tensor.shape)} {tensor.dtype}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
