"""A protocol: everything that a fair comparison holds fixed, and the grid of what it compares.

One TOML file. Every combination of entry, target, recovery budget, teaching and seed is a cell; a cell
depends on nothing but the protocol, so cells run in any order, in any process, and are cached by content.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunus.core.budget import Target
from prunus.core.digest import digest
from prunus.core.errors import ConfigError
from prunus.core.plugin_settings import first_problem
from prunus.core.settings import RunSettings, Text, make_settings, read_settings

FORMAT = 1
"""Part of every key: a change of what a cell means makes all cached ones stale."""
Teaching = Literal["plain", "distilled"]
Group = Literal["method", "reference", "rival"]
Epochs = Annotated[float, Field(ge=0, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_OWNED = ("plugin", "importance", "importance_config", "config", "targets", "epochs", "seed", "checkpoint")
"""Settings that the protocol decides for every cell."""


class DenseTraining(BaseModel):
    """How the dense model of every seed is trained, once."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    epochs: Annotated[float, Field(gt=0, le=100_000)]
    lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """Peak learning rate; None is the adapter's default for the data."""


class Entry(BaseModel):
    """One row of the table: a plugin with its settings, or a rival from outside the product."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}$")
    plugin: Text | None = None
    """A registered method, or package.module:Class."""
    rival: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] | None = None
    """module:function, imported from the protocol's `import_from`; called with a `compare_cell.RivalJob`."""
    importance: Text | None = None
    importance_config: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    """The method's or rival's own settings."""
    plain: dict[str, Any] = Field(default_factory=dict)
    """Further own settings where nobody is taught."""
    distilled: dict[str, Any] | None = None
    """Further own settings where the dense model may teach; an entry without them sits that table out, and all do
    where there is no recovery in which to be taught."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of run.toml that differ from [training], such as lr."""
    compute: float = Field(default=1.0, gt=0, le=1)
    """Share of the others' training MACs that a method which trains from scratch makes do with."""
    targets: tuple[Text, ...] | None = None
    """Only these of the protocol's targets."""
    epochs: tuple[Epochs, ...] | None = None
    """Only these of the protocol's recovery budgets."""
    seeds: tuple[Seed, ...] | None = None
    """Only these of the protocol's seeds."""
    group: Group | None = None
    """`method` (default of plugins) against `rival` (default of rivals); `reference` rows stand beside them."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.plugin is None) == (self.rival is None):
            raise ValueError(f"entry {self.name!r} must name either a plugin or a rival")
        owned = sorted(set(self.settings) & set(_OWNED))
        if owned:
            raise ValueError(f"entry {self.name!r}: {owned[0]} is the protocol's to set, not for [settings]")
        return self

    @property
    def side(self) -> Group:
        return self.group or ("method" if self.plugin is not None else "rival")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the comparison."""

    entry: Entry
    target: str
    epochs: float
    teaching: Teaching
    seed: int

    @property
    def name(self) -> str:
        """What --only matches: entry/target/epochs/teaching/seed."""
        return f"{self.entry.name}/{self.target}/{self.epochs:g}ep/{self.teaching}/seed{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        more = self.entry.plain if self.teaching == "plain" else self.entry.distilled
        return {**self.entry.config, **(more or {})}


class Protocol(BaseModel):
    """The whole file. `[training]` holds settings of run.toml that all cells share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    title: Text
    adapter: Text = "pytorch"
    model: Text
    data: Text
    train_limit: Annotated[int, Field(ge=1)] | None = None
    holdout: Annotated[float, Field(gt=0, lt=0.9)] = 0.1
    targets: Annotated[tuple[Text, ...], Field(min_length=1)]
    """All of the form macs=...: compute is what the entries are held equal in."""
    epochs: Annotated[tuple[Epochs, ...], Field(min_length=1)]
    """Recovery budgets, in epochs of the train split, on top of the dense training."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    teaching: Annotated[tuple[Teaching, ...], Field(min_length=1)] = ("plain",)
    dense: DenseTraining
    training: dict[str, Any] = Field(default_factory=dict)
    import_from: Path | None = None
    """Folder, relative to the protocol, that rivals are imported from."""
    entries: Annotated[tuple[Entry, ...], Field(min_length=1)]

    @field_validator("targets")
    @classmethod
    def _of_macs(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for text in targets:
            if Target.parse(text).metric != "macs":
                raise ValueError(f"target {text!r}: a comparison holds MACs equal; write macs=25% or macs=900M")
        return targets

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for field in ("targets", "epochs", "seeds", "teaching"):
            _no_twins(field, getattr(self, field))
        _no_twins("entries", [entry.name for entry in self.entries])
        for entry in self.entries:
            for field in ("targets", "epochs", "seeds"):
                strangers = set(getattr(entry, field) or ()) - set(getattr(self, field))
                if strangers:
                    raise ValueError(f"entry {entry.name!r}: {field} {sorted(strangers)} are not the protocol's")
        for values in (self.training, *(entry.settings for entry in self.entries)):
            make_settings({**self._shared, **values})
        return self

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "model": self.model,
            "data": self.data,
            "train_limit": self.train_limit,
            "holdout": self.holdout,
            "threads": 1,
            **self.training,
        }

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The grid: seeds outermost, then in the order of the file."""
        return tuple(self._cells())

    def _cells(self) -> Iterator[Cell]:
        for seed in self.seeds:
            for teaching in self.teaching:
                for target in self.targets:
                    for epochs in self.epochs:
                        for entry in self.entries:
                            cell = Cell(entry, target, epochs, teaching, seed)
                            if self._takes_part(cell):
                                yield cell

    def _takes_part(self, cell: Cell) -> bool:
        entry = cell.entry
        if cell.teaching == "distilled" and (entry.distilled is None or cell.epochs == 0):
            return False
        return (
            cell.target in (entry.targets or self.targets)
            and cell.epochs in (entry.epochs or self.epochs)
            and cell.seed in (entry.seeds or self.seeds)
        )

    def select(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """Cells whose name is, or matches, one of `patterns`; all without any. Raises ConfigError for none."""
        if not patterns:
            return self.cells
        found = tuple(cell for cell in self.cells if any(_matches(cell.name, pattern) for pattern in patterns))
        if not found:
            raise ConfigError(
                f"--only {' '.join(patterns)} matches none of {len(self.cells)} cells; they are named like "
                f"{self.cells[0].name}",
                key="only",
            )
        return found

    def dense_settings(self, seed: int) -> RunSettings:
        values = {**self._shared, "seed": seed, "dense_epochs": self.dense.epochs}
        if self.dense.lr is not None:
            values["lr"] = self.dense.lr
        return make_settings(values)

    def settings(self, cell: Cell, checkpoint: Path | None) -> RunSettings:
        """The run of a plugin's cell; of a rival's, all but the rival itself."""
        entry = cell.entry
        values = {
            **self._shared,
            **entry.settings,
            "targets": (cell.target,),
            "epochs": cell.epochs,
            "seed": cell.seed,
            "checkpoint": checkpoint,
        }
        if entry.plugin is not None:
            values |= {"plugin": entry.plugin, "importance": entry.importance}
            values |= {"importance_config": entry.importance_config, "config": cell.config}
        return make_settings(values)

    def dense_key(self, seed: int) -> str:
        """The content that a dense model follows from, as a name."""
        return digest({"format": FORMAT, "dense": _plain(self.dense_settings(seed))})[:16]

    def key(self, cell: Cell) -> str:
        """The content that a cell's figures follow from, as a name; what the row is called is no part of it."""
        content = {
            "format": FORMAT,
            "dense": self.dense_key(cell.seed),
            "settings": _plain(self.settings(cell, None)),
            "rival": cell.entry.rival,
            "config": cell.config,
            "teaching": cell.teaching,
            **({} if cell.entry.compute == 1 else {"compute": cell.entry.compute}),
        }
        return digest(content)[:16]


def read_protocol(path: Path) -> Protocol:
    """Raises ConfigError naming the file, the key and what is allowed."""
    values = read_settings(path)
    try:
        return Protocol.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}", key="protocol") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", key=error.key) from None


def _plain(settings: RunSettings) -> dict[str, Any]:
    """Without defaults: a setting that a later version adds makes no result stale."""
    return settings.model_dump(mode="json", exclude_defaults=True)


def _no_twins(field: str, values: Sequence[object]) -> None:
    twins = [value for i, value in enumerate(values) if value in values[:i]]
    if twins:
        raise ValueError(f"{field} names {twins[0]!r} twice")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
