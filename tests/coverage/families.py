"""What the sweep covers: timm's smallest architecture of every (module, class), every torchvision model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torchvision

RECORD = Path(__file__).parents[2] / "benchmarks" / "timm_families.json"
TOO_LARGE = (
    "torchvision/convnext_large",
    "torchvision/regnet_y_128gf",
    "torchvision/vit_h_14",
    "torchvision/vit_l_16",
    "torchvision/vit_l_32",
)
"""Beyond 150 M parameters, with smaller models of the same builder in the sweep: on request (`-k vit_h_14`)."""


def timm_families() -> list[str]:
    """Derived from timm itself; kept in benchmarks/ per timm version, since building 1400 models takes minutes."""
    if RECORD.exists():
        kept = json.loads(RECORD.read_text())
        if kept["timm"] == timm.__version__:
            return [entry["name"] for entry in kept["families"]]
    families = smallest(timm.list_models())
    RECORD.write_text(json.dumps({"timm": timm.__version__, "families": families}, indent=1) + "\n")
    return [entry["name"] for entry in families]


def smallest(names: Iterable[str]) -> list[dict[str, object]]:
    """The smallest of `names` for each (module of the builder, class of the model), by parameters."""
    best: dict[tuple[str, str], dict[str, object]] = {}
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        module, kind = timm.models.model_entrypoint(name).__module__, type(model).__name__
        params = sum(p.numel() for p in model.parameters())
        known = best.get((module, kind))
        if known is None or params < known["params"]:  # type: ignore[operator]
            best[module, kind] = {"name": f"timm/{name}", "module": module, "class": kind, "params": params}
    return sorted(best.values(), key=lambda entry: (entry["params"], entry["name"]))


def torchvision_models() -> list[str]:
    return [f"torchvision/{name}" for name in torchvision.models.list_models()]


def all_names() -> list[str]:
    return [*timm_families(), *torchvision_models()]
