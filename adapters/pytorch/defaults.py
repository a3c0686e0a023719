"""What a run does when its user says nothing: model, epochs, batch and rate, by kind of data."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.core.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults that suit one kind of data."""

    model: str
    epochs: float
    """Recovery after pruning."""
    dense_epochs: float
    """Training of the dense model where it has no weights for the data."""
    batch_size: int
    lr: float
    """Of a training from random weights; what is left after a removal wants `_GENTLER`."""


DIGITS = Recipe("timm/test_resnet", epochs=10, dense_epochs=20, batch_size=64, lr=0.2)
SMALL_IMAGES = Recipe("prunus/resnet20", epochs=6, dense_epochs=10, batch_size=128, lr=0.15)
IMAGES = Recipe("timm/resnet18", epochs=10, dense_epochs=90, batch_size=64, lr=0.05)
_GENTLER = 1 / 3
"""A refitted model keeps most of what the dense one knew: the full rate would undo that in its first steps."""
_SGD = ("sgd", "momentum", "nesterov", "sgdw", "sgdp")
"""Optimizers that want rates of another order than Adam and its kin."""


def recipe_for(data: str) -> Recipe:
    kind = data.partition(":")[0]
    if kind in ("digits", "none"):
        return DIGITS
    if kind == "fashion-mnist" or kind.split("/")[-1] in ("cifar10", "cifar100", "mnist", "svhn", "kmnist"):
        return SMALL_IMAGES
    return IMAGES


def has_labels(data: str) -> bool:
    """Whether the data of that name can train and judge a model."""
    return data != "none" and not data.startswith("images:")


def filled(settings: RunSettings) -> RunSettings:
    """`settings` with every None that the data's recipe answers filled in, as run.toml would give them back."""
    recipe, trains = recipe_for(settings.data), has_labels(settings.data)
    sgd = settings.opt in _SGD
    lr = recipe.lr if sgd else 1e-3
    chosen = {
        "model": recipe.model,
        "epochs": recipe.epochs if trains else 0.0,
        "dense_epochs": recipe.dense_epochs if trains else 0.0,
        "batch_size": recipe.batch_size,
        "lr": lr,
        "recovery_base_lr": settings.lr if settings.lr is not None else lr * _GENTLER,
        "weight_decay": 5e-4 if sgd else 0.05,
    }
    update = {name: value for name, value in chosen.items() if getattr(settings, name) is None}
    # Validated: with an int where a float belongs, the run's directives would be others when it is resumed.
    return RunSettings.model_validate({**settings.model_dump(), **update})
