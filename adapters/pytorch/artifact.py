"""The portable artifact: plan.json and model.safetensors rebuild the pruned model by name, without tracing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.utils._pytree import tree_flatten

from prunus.adapters.pytorch.attributes import apply_edits
from prunus.adapters.pytorch.blocks import remove_blocks
from prunus.adapters.pytorch.branching import replay_branches
from prunus.adapters.pytorch.catalog import construct
from prunus.adapters.pytorch.copies import in_eval
from prunus.adapters.pytorch.handlers import install_handlers
from prunus.adapters.pytorch.sizes import follow_computed
from prunus.adapters.pytorch.surgery import reindex
from prunus.adapters.pytorch.weights import load_strictly, read_tensors, untied_state, write_tensors
from prunus.core.errors import LoadError, VerificationError
from prunus.core.files import write_atomically
from prunus.core.plan import ModelSource, PruningPlan

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
MAX_PLAN_BYTES = 256 * 2**20

Builder = Callable[[ModelSource], nn.Module]


def apply_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Give the fresh original `model` what `plan` says: shapes, sizes, handlers, missing blocks, branches.

    In place. Weights are index-selected: for a plan that only removes, the result is the original with those units
    gone. Raises PlanError if the plan is of another model.
    """
    install_handlers(model, plan.handlers)
    reindex(model, plan.indices())
    apply_edits(model, plan.attributes)
    follow_computed(model)
    remove_blocks(model, plan.removed_blocks)
    replay_branches(model, plan.branches)


def write_plan(folder: Path, plan: PruningPlan) -> None:
    write_atomically(folder / PLAN_FILE, plan.model_dump_json(by_alias=True, indent=1))


def read_plan(folder: Path) -> PruningPlan:
    """Read and validate plan.json. Raises LoadError with the first thing that is wrong."""
    path = folder / PLAN_FILE
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise LoadError(f"{path} is larger than {MAX_PLAN_BYTES >> 20} MiB: not a plan")
        return PruningPlan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(f"{folder} holds no finished run: {PLAN_FILE} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LoadError(f"{path} is not a valid plan: {where}: {first['msg']}") from error
    except (OSError, RecursionError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def save_artifact(
    folder: Path, model: nn.Module, plan: PruningPlan, build: Builder, example: tuple[Any, ...]
) -> None:
    """Write `model` (the pruned one) and `plan` into `folder`, load them again and compare the outputs.

    Raises VerificationError if the loaded model does not answer `example` bit for bit like `model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, untied_state(model), {"format": "pt"})
    write_plan(folder, plan)
    again = assemble(folder, build)
    again.to(next(model.parameters()).device)
    difference = largest_difference(answer(model, example), answer(again, example))
    if difference != 0.0:
        raise VerificationError(
            f"the model in {folder}, loaded again, differs by {difference:.3g} from the one in memory",
            max_error=difference,
            scale=1.0,
        )


def load(folder: str | Path, *, original: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The pruned model of a finished run: a plain module of its original class, on the CPU, in eval mode.

    `original` is a fresh model of the original architecture, for runs whose model has no name; it is
    changed in place and returned. `trust` allows a model named `python:module:factory`, whose code is then
    imported. Raises LoadError or PlanError if the folder is incomplete, damaged or of another model.
    """
    if original is not None:
        return assemble(Path(folder), lambda source: original)
    return assemble(Path(folder), lambda source: construct(source, allow_python=trust))


def assemble(folder: Path, build: Builder) -> nn.Module:
    """The model of `folder`, made from the original that `build` gives."""
    return rebuilt(read_plan(folder), folder / WEIGHTS_FILE, build)


def rebuilt(plan: PruningPlan, weights: Path, build: Builder) -> nn.Module:
    """The model of `plan` with the `weights` of a file, made from the original that `build` gives."""
    model = build(plan.model)
    apply_plan(model, plan)
    load_strictly(model, read_tensors(weights), str(weights))
    return in_eval(model)


def answer(model: nn.Module, example: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors of the model's output, in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(*example)
    model.train(was_training)
    leaves, _ = tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest absolute difference of two outputs: 0 for equality bit for bit, infinite for other shapes."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if not torch.equal(a, b):
            worst = max(worst, float((a.double() - b.double()).abs().max()), 5e-324)
    return worst
