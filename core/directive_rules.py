"""What a directive must satisfy before an adapter sees it. A broken rule is the plugin's fault, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np

from prunus.core.directives import (
    Distillation,
    Evaluate,
    Gates,
    Grow,
    Measure,
    Merge,
    Note,
    Remove,
    Snapshot,
    Train,
)
from prunus.core.errors import PlanError, PluginError, PrunusError
from prunus.core.graph import ChannelGraph, Keep
from prunus.core.policy import PruningTask
from prunus.core.signals import NEEDS_DATA, NEEDS_LABELS, Signal

_SNAPSHOT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SPLITS = ("train", "holdout", "calibration")
_SCHEDULES = ("cosine", "constant")
_RECALIBRATION = ("no", "yes", "if-better")
_REFITS = ("none", "bias", "least-squares", "sequential")
MAX_NOTE_VALUES = 100_000


@dataclass(slots=True)
class DirectiveRules:
    """The rules, with what they depend on: the current graph and the snapshots taken so far."""

    plugin: str
    task: PruningTask
    graph: ChannelGraph
    snapshots: set[str] = field(default_factory=set)
    reserved: frozenset[str] = frozenset()
    """Names of snapshots that the run itself takes, at the moment."""

    def check(self, directive: object) -> None:
        """Raises PluginError naming the plugin, the rule and the value."""
        try:
            self._check(directive)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PrunusError):
                raise
            rule = "a directive's fields have the declared types"
            raise PluginError(self.plugin, rule, f"{type(directive).__name__}: {error}.") from error

    def _check(self, directive: object) -> None:
        if isinstance(directive, Measure):
            self._measure(directive)
        elif isinstance(directive, Train):
            self._train(directive)
        elif isinstance(directive, Evaluate):
            self._evaluate(directive)
        elif isinstance(directive, Grow):
            self._grow(directive)
        elif isinstance(directive, Merge):
            self._require(bool(self._branched()), "Merge needs branches", "the graph has none")
        elif isinstance(directive, Remove):
            self._remove(directive)
        elif isinstance(directive, Snapshot):
            self._require(
                bool(_SNAPSHOT.fullmatch(directive.name)), "a snapshot's name is a-z 0-9 . _ -", directive
            )
            taken = directive.name in {"ema", *self.task.teachers, *self.reserved}
            self._require(not taken, "a snapshot's name is not one that the run itself uses", directive.name)
        elif isinstance(directive, Note):
            self._note(directive)
        else:
            self._fail("it must yield directives of prunus.core", f"It yielded {type(directive).__name__}.")

    def _measure(self, directive: Measure) -> None:
        known = all(isinstance(signal, Signal) for signal in directive.signals)
        self._require(known and bool(directive.signals), "Measure names signals of prunus.core.Signal", directive)
        self._require(directive.split in _SPLITS, f"a split is one of {_SPLITS}", directive.split)
        self._images(directive.images)
        part, parts = directive.fold
        self._require(0 <= part < parts, "a fold (k, n) has 0 <= k < n", directive.fold)
        if not self.task.has_data and directive.signals & NEEDS_DATA:
            self._fail(
                "without data only Signal.WEIGHT can be measured", f"It asked for {_names(directive.signals)}."
            )
        if not self.task.has_labels and directive.signals & NEEDS_LABELS:
            self._fail("without labels no gradient can be measured", f"It asked for {_names(directive.signals)}.")
        self._gates(directive.gates, "gates", 2.0, self.graph.blocks)
        self._require(directive.refit in _REFITS, f"a refit is one of {_REFITS}", directive.refit)
        self._layers(directive)
        if not self.task.has_data and directive.refit != "none":
            self._fail("without data nothing can be refitted", f"It asked for refit={directive.refit!r}.")
        if (self._branched() or directive.gates) and (directive.blocks or directive.kernels):
            self._fail("layers are left out of a measurement that has neither gates nor branches", f"{directive}.")

    def _train(self, directive: Train) -> None:
        self._require(
            self.task.has_data and self.task.has_labels, "nothing is trained without data", "--data none"
        )
        self._number(directive.epochs, "Train.epochs", 0.0, 1e6)
        if directive.lr is not None:
            self._number(directive.lr, "Train.lr", 0.0, 1e3)
        self._number(directive.warmup, "Train.warmup", 0.0, 1.0)
        self._require(directive.schedule in _SCHEDULES, f"a schedule is one of {_SCHEDULES}", directive.schedule)
        self._require(
            0 <= directive.start < directive.stop <= 1, "0 <= start < stop <= 1", (directive.start, directive.stop)
        )
        if directive.ema is not None:
            self._number(directive.ema, "Train.ema", 0.0, 1.0)
        if directive.clip is not None:
            self._number(directive.clip, "Train.clip", 1e-9, 1e9)
        self._gates(directive.gates, "gates", 2.0, self.graph.blocks)
        self._gates(directive.decay, "decay", 1e6, {n for n, b in self.graph.blocks.items() if b.of is not None})
        self._keep(directive.within, "within")
        if directive.distil is not None:
            self._distil(directive.distil, ema=directive.ema is not None)

    def _distil(self, distil: Distillation, ema: bool) -> None:
        self._number(distil.weight, "Distillation.weight", 0.0, 1.0)
        self._number(distil.temperature, "Distillation.temperature", 1e-3, 1e3)
        self._require(bool(distil.teachers), "Distillation names at least one teacher", distil.teachers)
        known = {*self.task.teachers, *self.snapshots} | ({"ema"} if ema else set())
        for teacher in distil.teachers:
            self._require(teacher in known, f"a teacher is one of {sorted(known)}", teacher)

    def _evaluate(self, directive: Evaluate) -> None:
        has_labels = self.task.has_data and self.task.has_labels
        self._require(has_labels, "nothing is evaluated without labelled data", "--data none")
        self._require(directive.split in _SPLITS, f"a split is one of {_SPLITS}", directive.split)
        self._require(directive.refit in _REFITS, f"a refit is one of {_REFITS}", directive.refit)
        if directive.images is not None:
            self._images(directive.images)
        if directive.model is not None:
            known = {*self.task.teachers, *self.snapshots}
            self._require(directive.model in known, f"a model is one of {sorted(known)}", directive.model)
            changed = directive.gates or directive.within is not None
            self._require(not changed, "a snapshot is evaluated as it is", directive)
        self._gates(directive.gates, "gates", 2.0, self.graph.blocks)
        self._keep(directive.within, "within")
        self._layers(directive)
        if directive.within is None and (directive.blocks or directive.kernels):
            self._fail("blocks and kernels go from a sub-network", "Evaluate.within is None.")
        if directive.within is not None:
            self._merged_before(directive.refit)

    def _grow(self, directive: Grow) -> None:
        self._number(directive.noise, "Grow.noise", 0.0, 1.0)
        for name, width in directive.widths.items():
            group = self._known(name, "widths")
            self._require(_is_whole(width), "a width is a whole number", f"{name!r}: {width}")
            if width < self.graph.groups[group].units:
                self._fail("Grow does not shrink", f"{name!r} has {self.graph.groups[group].units}, got {width}.")
            reason = self.graph.growable(name) if width > self.graph.groups[group].units else None
            if reason is not None:
                self._fail("Grow widens only what can be widened", f"{name!r}: {reason}.")
        self._tied(directive.widths)
        self._names(directive.branches, "Grow.branches")
        self._require(
            not (directive.branches and directive.widths), "Grow widens or branches, not both at once", directive
        )
        for name in directive.branches:
            kernel = self.graph.kernels.get(name)
            if kernel is None or not kernel.branches:
                self._fail("Grow.branches names kernels of the graph that can run as branches", f"Got {name!r}.")
        self._require(
            not (directive.branches and self._branched()), "a model is branched once at a time", directive
        )

    def _tied(self, widths: Mapping[str, int]) -> None:
        after = {**self.graph.units, **widths}
        tied: dict[str, tuple[str, int]] = {}
        for name, group in self.graph.groups.items():
            if group.equal_count is not None:
                first, width = tied.setdefault(group.equal_count, (name, after[name]))
                if after[name] != width:
                    detail = f"{first!r} would have {width} units, {name!r} {after[name]}."
                    self._fail("groups of equal width grow together", detail)

    def _remove(self, directive: Remove) -> None:
        self._require(directive.refit in _REFITS, f"a refit is one of {_REFITS}", directive.refit)
        if not self.task.has_data and directive.refit != "none":
            self._fail("without data nothing can be refitted", f"It asked for refit={directive.refit!r}.")
        words = _RECALIBRATION
        self._require(directive.recalibrate in words, f"recalibrate is one of {words}", directive.recalibrate)
        if not self.task.has_data and directive.recalibrate != "no":
            self._fail("without data nothing can be recalibrated", f"It asked for {directive.recalibrate!r}.")
        self._images(directive.images)
        self._keep(directive.keep, "keep")
        self._layers(directive)
        for name, branches in self._branched().items():
            if branches <= set(directive.blocks):
                self._fail("one branch of every convolution stays", f"All of {name!r} would go.")
        self._merged_before(directive.refit)
        self._gates(directive.gates, "gates", 2.0)
        self._gates(directive.survival, "survival", 1.0)

    def _layers(self, directive: Measure | Remove | Evaluate) -> None:
        kind = type(directive).__name__
        for what, names, known in (
            ("blocks", directive.blocks, self.graph.blocks),
            ("kernels", directive.kernels, self.graph.kernels),
        ):
            self._names(names, f"{kind}.{what}")
            for name in names:
                if name not in known:
                    self._fail(f"{kind}.{what} names {what} of the current graph", f"There is no {name!r}.")

    def _merged_before(self, refit: str) -> None:
        if self._branched() and refit != "none":
            self._fail("branches are merged before anything is refitted", f"It asked for refit={refit!r}.")

    def _branched(self) -> dict[str, set[str]]:
        """Convolution -> its branches that are left."""
        found: dict[str, set[str]] = {}
        for block in self.graph.blocks.values():
            if block.of is not None:
                found.setdefault(block.of, set()).add(block.name)
        return found

    def _names(self, names: tuple[str, ...], what: str) -> None:
        self._require(isinstance(names, tuple), f"{what} is a tuple of names", names)
        self._require(len(set(names)) == len(names), f"{what} says each name once", names)

    def _note(self, directive: Note) -> None:
        total = 0
        for key, value in directive.values.items():
            items = [value] if isinstance(value, str | int | float) else list(value)
            total += len(items)
            for item in items:
                if isinstance(item, str):
                    continue
                self._require(math.isfinite(float(item)), "a Note's numbers are finite", f"{key}={item}")
        self._require(total <= MAX_NOTE_VALUES, f"a Note holds at most {MAX_NOTE_VALUES} values", total)

    def _gates(self, gates: Gates | None, what: str, largest: float, blocks: Container[str] = ()) -> None:
        """`blocks`: those that have one number, too."""
        for name, values in (gates or {}).items():
            units = 1 if name in blocks else self.graph.groups[self._known(name, what)].units
            array = np.asarray(values)
            if array.shape != (units,):
                self._fail(f"{what} have one number per unit", f"{name!r}: shape {array.shape}, units {units}.")
            if not np.isfinite(array).all():
                self._fail(f"{what} are finite", f"{name!r} holds NaN or infinity.")
            if array.min(initial=0) < 0 or array.max(initial=0) > largest:
                self._fail(f"{what} lie in 0..{largest:g}", f"{name!r}: {array.min():g}..{array.max():g}.")

    def _keep(self, keep: Keep | None, what: str) -> None:
        if keep is None:
            return
        if not isinstance(keep, Mapping) or not all(_is_units(units) for units in keep.values()):
            self._fail(f"{what} maps group names to whole unit numbers", f"It is {type(keep).__name__}.")
        try:
            self.graph.check_keep(keep)
        except PlanError as error:
            raise PluginError(self.plugin, f"{what} must keep to the graph's rules", f"{error}.") from error

    def _known(self, name: str, what: str) -> str:
        if name not in self.graph.groups:
            self._fail(f"{what} name groups of the current graph", f"There is no {name!r}.")
        return name

    def _images(self, images: int) -> None:
        self._require(_is_whole(images) and images >= 1, "images are a whole number, at least one", images)

    def _number(self, value: float, what: str, least: float, most: float) -> None:
        finite = isinstance(value, int | float | np.floating) and math.isfinite(value)
        self._require(finite and least <= value <= most, f"{what} lies in {least:g}..{most:g}", value)

    def _require(self, holds: bool, rule: str, value: object) -> None:
        if not holds:
            self._fail(rule, f"Got {str(value)[:200]}.")

    def _fail(self, rule: str, detail: str) -> None:
        raise PluginError(self.plugin, rule, detail)


def _is_units(units: object) -> bool:
    array = np.asarray(units)
    return array.ndim == 1 and (array.size == 0 or array.dtype.kind in "iu")


def _is_whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _names(signals: frozenset[Signal]) -> str:
    return ", ".join(sorted(signal.value for signal in signals))
