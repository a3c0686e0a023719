"""Everything a run depends on, as one validated value: the command line's options, run.toml, provenance."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prunus.core.budget import Target
from prunus.core.errors import ConfigError
from prunus.core.plugin_settings import first_problem, parse_assignments
from prunus.core.toml_text import to_toml

_MAX_BYTES = 2**20
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class RunSettings(BaseModel):
    """Settings of one run. None means: the adapter's default for this model and data, filled in by the session."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    plugin: Text = "gsm-anneal"
    """Pruning method: a registered name, or package.module:Class."""
    importance: Text | None = None
    """Importance estimator, for the methods that rank by one (default: magnitude)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The method's own settings (--set KEY=VALUE)."""
    importance_config: dict[str, Any] = Field(default_factory=dict)
    """The estimator's own settings (--set importance.KEY=VALUE)."""
    targets: Annotated[tuple[Text, ...], Field(min_length=1, max_length=8)] = ("macs=50%",)
    """What must remain: macs=50%, macs=900M, params=5M, size=8MB; all must hold."""

    adapter: Text = "pytorch"
    """Framework adapter, a registered name."""
    model: Text | None = None
    """timm/NAME, torchvision/NAME, prunus/NAME or python:module:factory."""
    pretrained: bool = False
    """Start from the weights that the model's library publishes."""
    checkpoint: Path | None = None
    """Start from this file: safetensors, or .pth read with weights_only."""
    data: Text = "digits"
    """digits, fashion-mnist[:DIR], a timm data set (torch/cifar10), a folder with train/ and val/, or none."""
    teachers: tuple[Text, ...] = ()
    """Further teachers for distillation: a model name with weights, or a finished run's folder."""

    epochs: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """The method's training budget, in epochs of the train split."""
    dense_epochs: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """Epochs that train the dense model first, where it has no weights for the data's classes."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Images per training step."""
    lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """Peak learning rate."""
    recovery_lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """Peak learning rate after removals; none: found from `recovery_base_lr` and the loss and length of each."""
    recovery_base_lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """The peak of a usual recovery; none: `lr` if that is given, else a third of its default."""
    opt: Text = "sgd"
    """Optimizer: sgd (nesterov), adamw, or another name that timm knows: lamb, nadamw, lion, ..."""
    sched: Literal["cosine", "tanh", "poly", "step"] | None = None
    """timm's scheduler for the learning rate of trainings that come to an end; none: the method's cosine."""
    decay_epochs: Annotated[float, Field(gt=0, le=100_000)] = 90.0
    """Scheduler step: epochs between two falls."""
    decay_rate: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Scheduler step: factor of each fall; poly: its exponent."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """alpha of mixup: training images are blended in pairs; 0: they are not."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """alpha of cutmix: a part of a training image comes from another; 0: it does not."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing in training."""
    aa: Text | None = None
    """Augmentation policy in timm's notation: rand-m9-n2-mstd0.5 (RandAugment), augmix-m5-w4-d2, original, ..."""
    reprob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of random erasing."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    """Weight decay."""
    img_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Side of the square input image, in pixels."""
    train_limit: Annotated[int, Field(ge=1)] | None = None
    """Train on at most so many images (stratified, seeded)."""
    steps_per_epoch: Annotated[int, Field(ge=1)] | None = None
    """Batches that make an epoch of a stream (wds/...) that does not say how long it is."""
    num_classes: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Classes of a stream (wds/...), which cannot be looked up in it."""
    holdout: Annotated[float, Field(gt=0, lt=0.9)] = 0.1
    """Share of train that is held out to judge by."""

    min_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The smallest share of its units that any group keeps."""
    multiple_of: Annotated[int, Field(ge=1, le=1024)] = 1
    """Channels that a layer keeps are multiples of this; of heads, those of all heads together."""
    verify: bool = True
    """Check masked against pruned outputs at every removal."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    device: Text = "cpu"
    """cpu, cuda, cuda:1, mps, or auto."""
    amp: bool = False
    """Train in mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """The short numbers of mixed precision; with float16 losses are scaled."""
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Compute each batch in so many parts, one after the other, to save memory; a step is one batch still."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together; longer ones are shortened."""
    model_ema: bool = False
    """Average the weights over the steps of a training, and keep the average where it is better held out."""
    model_ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9998
    """Decay of that average, per step; smaller in the first steps."""
    torchcompile: bool = False
    """Compile the model for training; every removal compiles it anew."""
    channels_last: bool = False
    """Memory layout that convolutions like."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that load data."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads for computing; resumed runs are bit-identical only with the same number."""
    track: tuple[Text, ...] = ()
    """Experiment trackers that get the run's figures: tensorboard, wandb, mlflow, ... (those of accelerate)."""
    trust: bool = False
    """Allow code named by files (python: factories in a run folder)."""

    @field_validator("targets")
    @classmethod
    def _targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for text in targets:
            Target.parse(text)
        return targets

    @property
    def parsed_targets(self) -> tuple[Target, ...]:
        return tuple(Target.parse(text) for text in self.targets)

    @property
    def code(self) -> tuple[str, ...]:
        """Names among these settings that import code when they are used: module:Class, python:module:factory."""
        names = (self.plugin, self.importance or "", self.adapter, self.model or "", *self.teachers)
        return tuple(name for name in names if ":" in name)

    def with_plugin_settings(self, assignments: Sequence[str]) -> RunSettings:
        """These settings with `KEY=VALUE` (the method's) and `importance.KEY=VALUE` (the estimator's) added."""
        config, importance_config = dict(self.config), dict(self.importance_config)
        for key, value in parse_assignments(assignments).items():
            if key.startswith("importance."):
                importance_config[key.removeprefix("importance.")] = value
            else:
                config[key] = value
        return self.model_copy(update={"config": config, "importance_config": importance_config})

    def to_toml(self) -> str:
        """The text of a run.toml that gives these settings again. Permission to run code is not passed on."""
        comments = {key: " ".join((field.description or "").split()) for key, field in _fields()}
        return to_toml(self.model_dump(mode="json", exclude={"trust"}), comments)


def make_settings(values: Mapping[str, Any]) -> RunSettings:
    """Settings from plain data. Raises ConfigError naming the key, its value and what is allowed."""
    known = [key for key, _ in _fields()]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ""
            raise ConfigError(f"There is no setting {key!r}.{hint}", key=key)
    try:
        return RunSettings.model_validate(dict(values))
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        raise ConfigError(first_problem(error), key=str(location[0]) if location else None) from None


_FOLLOWING = {
    "plugin": ("config", "importance", "importance_config"),
    "importance": ("importance_config",),
    "opt": ("lr", "recovery_lr", "recovery_base_lr", "weight_decay"),
    "lr": ("recovery_base_lr",),
}
"""What a run.toml says for one choice and has no meaning for another."""


def override(base: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`base` with `given` in its place, and the names of what `base` said for choices that are others now.

    Those are left out: settings of another method are not this one's, SGD's learning rate is not Adam's.
    """
    changed = [name for name in _FOLLOWING if name in given and base.get(name) not in (None, given[name])]
    left_out = {key for name in changed for key in _FOLLOWING[name] if key not in given and base.get(key)}
    return {**{key: value for key, value in base.items() if key not in left_out}, **given}, sorted(left_out)


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a run.toml, not yet validated. Raises ConfigError if it cannot be."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than the {_MAX_BYTES} bytes allowed", key="config")
        return tomllib.loads(path.read_text("utf-8"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", key="config") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {str(error)[:200]}", key="config") from None


def _fields() -> list[tuple[str, Any]]:
    return list(RunSettings.model_fields.items())
