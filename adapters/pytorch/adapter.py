"""`PyTorchAdapter`: carries out a policy's directives on one model.

Reads like the life of a run: measure, evaluate, train, grow, remove, snapshot, checkpoint, restore. What a
directive does to tensors is in the modules that this one calls; here is who is called, and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.adapters.pytorch.averaging import WeightAverage, decay_of, settle
from prunus.adapters.pytorch.batches import Batches, DataBundle
from prunus.adapters.pytorch.branching import settle_norms
from prunus.adapters.pytorch.copies import copied, in_eval
from prunus.adapters.pytorch.distillation import Teacher, classification_loss
from prunus.adapters.pytorch.evaluation import evaluate
from prunus.adapters.pytorch.gating import Gating, fold, when_gated
from prunus.adapters.pytorch.lineage import map_back, of_kept, spread
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.processes import ALONE, Processes
from prunus.adapters.pytorch.progress import Progress
from prunus.adapters.pytorch.recalibration import recalibrate, recalibrate_if_better
from prunus.adapters.pytorch.refit import refit
from prunus.adapters.pytorch.run_state import (
    Remembered,
    read_base,
    read_counters,
    rebuild_model,
    restore_optimizer,
    write_state,
)
from prunus.adapters.pytorch.schedule import EpochsDone
from prunus.adapters.pytorch.shrinking_model import UNVERIFIED, Origin, ShrinkingModel
from prunus.adapters.pytorch.signals import MeasuredSignals, measure
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.adapters.pytorch.unit_decay import UnitDecay
from prunus.core.adapter import Watcher
from prunus.core.cost import FloatArray
from prunus.core.directives import (
    Changed,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Merge,
    Refit,
    Remove,
    Snapshot,
    Train,
    Trained,
    Verification,
)
from prunus.core.errors import ConfigError, JournalError
from prunus.core.graph import ChannelGraph, Keep
from prunus.core.plan import PruningPlan
from prunus.core.signals import NEEDS_DATA

TRIAL_IMAGES = 512
"""Calibration images that refit a sub-network which is only evaluated."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What the run decides for all directives."""

    training: TrainingSettings
    seed: int = 0
    min_share: float = 0.05
    multiple_of: int = 1
    verify: bool = True
    trains: bool = True
    """Removals are followed by training, which refitted weights must bear (`refit`)."""


class PyTorchAdapter:
    """One model, its data and everything that changes while it is pruned."""

    def __init__(
        self,
        model: nn.Module,
        origin: Origin,
        settings: AdapterSettings,
        data: DataBundle | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Traces and certifies `model`, which must be the whole original. Raises TraceError.

        Of several `processes` all carry out the same directives, each on its share of `data`.
        """
        self.origin, self.settings, self.data, self.processes = origin, settings, data, processes
        self.shrinking = ShrinkingModel(
            model, origin, settings.training.device, settings.min_share, settings.multiple_of
        )
        self.snapshots: dict[str, Remembered] = {}
        self._watcher: Watcher | None = None
        self._averaged: nn.Module | None = None
        self._target: Remembered | None = None
        self._state_changes = 0
        self._done = EpochsDone()

    @property
    def model(self) -> nn.Module:
        """The model as it is now."""
        return self.shrinking.module

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.shrinking.module = model

    @property
    def plan(self) -> PruningPlan:
        """Everything that has happened to the model so far."""
        return self.shrinking.plan

    @property
    def graph(self) -> ChannelGraph:
        return self.shrinking.graph

    @property
    def original_graph(self) -> ChannelGraph:
        return self.shrinking.original_graph

    @property
    def companions(self) -> list[nn.Module]:
        """Moving averages that the user keeps of the model: removals and growths change them, too."""
        return self.shrinking.companions

    @property
    def forward_macs(self) -> float:
        """MACs of one forward pass of one image through the model as it is."""
        return self.shrinking.forward_macs

    def watch(self, watcher: Watcher) -> None:
        self._watcher = watcher
        if self.data is not None:
            self.data.broken.listen(watcher.notice)

    def trace(self) -> ChannelGraph:
        return self.original_graph

    # ---- measure, evaluate ------------------------------------------------------------------------

    def measure(self, directive: Measure) -> MeasuredSignals:
        signals, loss = directive.signals, classification_loss
        wanted = directive.split, directive.images, directive.fold
        batches: Any = self._share(*wanted) if signals & NEEDS_DATA else ()
        if directive.blocks or directive.kernels:
            return measure(*self._trial(directive, {}), batches, signals, loss, processes=self.processes)
        merged, gates = self.shrinking.merged(directive.gates)
        more = None if merged is self.model else self.model
        return measure(merged, self.graph, batches, signals, loss, gates, processes=self.processes, more=more)

    def evaluate(self, directive: Evaluate) -> Evaluated:
        batches = self._share(directive.split, directive.images)
        if directive.model is not None:
            return self._evaluated(self._snapshot(directive.model).model, batches)
        if directive.within is None:
            with Gating(self.model, self.shrinking.wiring, directive.gates):
                return self._evaluated(self.model, batches)
        small, graph = self._trial(directive, directive.within)
        with Gating(small, graph, of_kept(directive.gates, directive.within)):
            return self._evaluated(small, batches)

    def _evaluated(self, module: nn.Module, batches: Batches) -> Evaluated:
        """`batches`: this process's share; the answer is for those of all."""
        return evaluate(module, batches, self.settings.training.device, self.processes)

    def _trial(self, directive: Evaluate | Measure, keep: Keep) -> tuple[nn.Module, ChannelGraph]:
        """A copy that keeps `keep` alone, without the layers that `directive` names, refitted; its graph."""
        small, graph = self.shrinking.extracted(keep, directive.blocks, directive.kernels)
        recalibrated = isinstance(directive, Evaluate) and directive.recalibrate

        def adjust() -> None:
            if directive.refit != "none":
                plan = self.plan.after_removal(self.graph, keep, (), None, directive.blocks, directive.kernels)
                self._refit(small, plan, directive.refit, TRIAL_IMAGES)
            if recalibrated:
                recalibrate(small, self._split("calibration").part(TRIAL_IMAGES))

        if directive.refit != "none" or recalibrated:
            self.processes.by_first(adjust, small)
        return small, graph

    def test(self) -> Evaluated:
        """The current model on the test split."""
        return self._evaluated(self.model, self._share("test"))

    def _share(self, split: str, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> Batches:
        """What this process takes of a part of a split."""
        return self.processes.share(self._split(split).part(images, fold))

    def _split(self, name: str) -> Batches:
        """Images without augmentation."""
        if self.data is None:
            raise ConfigError("this needs images, but --data is none")
        return {
            "train": self.data.calibration,
            "calibration": self.data.calibration,
            "holdout": self.data.holdout,
            "test": self.data.test,
        }[name]

    # ---- train ------------------------------------------------------------------------------------

    def train(self, directive: Train) -> Trained:
        if self.data is None:
            raise ConfigError("nothing can be trained: --data is none")
        if directive.within is not None:
            result = self._train_within(directive, directive.within)
        else:
            result = self._train(directive)
        self.trained()
        return result

    def trained(self) -> None:
        """The current model has been trained: by `train`, or by the user's own loop."""
        self._averaged = self._target = None
        self._done = EpochsDone()
        self._state_changes += 1

    def _train(self, directive: Train) -> Trained:
        average, decay = None, decay_of(directive, self.settings.training.average)
        if decay is not None:
            if self._averaged is None:
                self._averaged = copied(self.model)
            updates = self._done.count * self._bundle.train.steps
            average = WeightAverage(self._averaged, self.model, decay, updates)
        job = Job(
            directive=directive,
            index=self._state_changes,
            forward_macs=self.forward_macs,
            teachers=self.teachers(directive),
            make_hook=when_gated(self.model, self.shrinking.wiring, directive.gates),
            decay=UnitDecay(self.model, self.shrinking.wiring, directive.decay) if directive.decay else None,
            average=average,
            done=self._done,
            on_epoch_end=self._epoch_ended,
            progress=self._stepped,
            notice=self._notice,
        )
        result = self._trainer.train(self.model, self.optimizer, job)
        if self._averaged is not None and directive.ema is not None:
            self.snapshots["ema"] = Remembered(in_eval(self._averaged), self.plan, self.forward_macs)
        elif self._averaged is not None:
            self._notice(settle(self.model, self._averaged, self._judged))
        return result

    def _judged(self, module: nn.Module) -> Evaluated:
        return self._evaluated(module, self._share("holdout"))

    def _notice(self, text: str) -> None:
        if self._watcher is not None:
            self._watcher.notice(text)

    def _train_within(self, directive: Train, keep: Keep) -> Trained:
        """Train an extracted copy, then map its weights back to their places."""
        small, graph = self.shrinking.extracted(keep)
        gates, decay = of_kept(directive.gates, keep), of_kept(directive.decay, keep)
        job = Job(
            directive=directive,
            index=self._state_changes,
            forward_macs=graph.cost().macs,
            teachers=self.teachers(directive),
            make_hook=when_gated(small, graph, gates),
            decay=UnitDecay(small, graph, decay) if decay else None,
            progress=self._stepped,
            notice=self._notice,
        )
        result = self._trainer.train(small, self.settings.training.make_optimizer(small), job)
        map_back(small, self.model, self.shrinking.wiring, keep)
        self._restart_companions()
        return result

    def _restart_companions(self) -> None:
        """An average over weights from before a refit is of no use: it begins again with the new ones."""
        for companion in self.companions:
            companion.load_state_dict(self.model.state_dict())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """One for the whole run: its state follows every removal and growth."""
        if self.shrinking.optimizer is None:
            self.shrinking.optimizer = self.settings.training.make_optimizer(self.model)
        return self.shrinking.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.shrinking.optimizer = optimizer

    @property
    def _trainer(self) -> Trainer:
        train = self.processes.share(self._bundle.train)
        return Trainer(self.settings.training, train, self.settings.seed, self.processes)

    @property
    def _bundle(self) -> DataBundle:
        assert self.data is not None
        return self.data

    def teachers(self, directive: Train) -> list[Teacher]:
        """The models that `directive.distil` names. Raises ConfigError for one that was never remembered."""
        names = directive.distil.teachers if directive.distil is not None else ()
        remembered = [(name, self._snapshot(name)) for name in names]
        return [Teacher(found.model, name, found.macs) for name, found in remembered]

    def _epoch_ended(self, done: EpochsDone) -> None:
        self._done = done
        if self._watcher is not None:
            self._watcher.boundary()

    def _stepped(self, progress: Progress) -> None:
        if self._watcher is not None:
            self._watcher.progress(progress.label, progress.step, progress.total, progress.loss, progress.lr)

    # ---- grow, remove -----------------------------------------------------------------------------

    def grow(self, directive: Grow) -> Changed:
        self.shrinking.grow(directive, self._seed)
        if directive.branches and self.data is not None:
            batches = self._split("calibration").part(TRIAL_IMAGES)
            self.processes.by_first(lambda: settle_norms(self.model, directive.branches, batches), self.model)
            self._restart_companions()
        self._target = None
        self._state_changes += 1
        return self._changed(UNVERIFIED)

    def merge(self, directive: Merge) -> Changed:
        verification = self.shrinking.merge(self._seed, verified=self.settings.verify)
        self._target = None
        self._state_changes += 1
        return self._changed(verification)

    def remove(self, directive: Remove) -> Changed:
        before, plan = self.graph, self.plan
        keep = before.check_keep(directive.keep)
        if directive.gates:
            for model in (self.model, *self.companions):
                fold(model, self.shrinking.wiring, directive.gates)
            self._target = None
        target = self._target = self._target or Remembered(copied(self.model), plan, self.forward_macs)
        verification = self.shrinking.remove(
            keep, directive.blocks, directive.kernels, verified=self.settings.verify, seed=self._seed
        )

        def adjust() -> float | None:
            if directive.refit != "none":
                survival = directive.survival
                if survival is not None:
                    dense, kept = self.shrinking.since(target.plan, plan)
                    survival = spread(survival, kept, dense)
                self._refit(self.model, self.plan, directive.refit, directive.images, survival)
            return self._recalibrate(directive)

        refit_from = self.processes.by_first(adjust, self.model)
        if directive.refit != "none" or directive.recalibrate != "no":
            self._restart_companions()
        self._state_changes += 1
        return self._changed(verification, refit_from)

    def _changed(self, verification: Verification, refit_from: float | None = None) -> Changed:
        branched = self.forward_macs if self.plan.branches else None
        return Changed(self.graph, self.plan, verification, refit_from, branched)

    def _refit(
        self,
        small: nn.Module,
        plan: PruningPlan,
        mode: Refit,
        images: int,
        survival: Mapping[str, FloatArray] | None = None,
    ) -> None:
        """Refit `small`, of `plan`, to the model as it was last trained: refits of refits would drift."""
        if self._target is None:
            self._target = Remembered(copied(self.model), self.plan, self.forward_macs)
        dense, since = self.shrinking.since(self._target.plan, plan)
        batches = self._split("calibration").part(images)
        kept, places = dense.kept_indices(since), self.shrinking.places(self._target.plan, plan)
        model, trains, told = self._target.model, self.settings.trains, self._stepped
        done = refit(small, model, dense, kept, batches, mode, survival, places, trains=trains, progress=told)
        if done.skipped and small is self.model:
            self._notice(done.left_out)

    def _recalibrate(self, directive: Remove) -> float | None:
        if directive.recalibrate == "no":
            return None
        calibration, device = self._split("calibration").part(directive.images), self.settings.training.device
        if directive.recalibrate == "yes":
            recalibrate(self.model, calibration)
            return None
        return recalibrate_if_better(self.model, calibration, self._split("holdout"), device)

    # ---- snapshot, checkpoint, restore ------------------------------------------------------------

    def snapshot(self, directive: Snapshot) -> None:
        model = in_eval(copied(self.model))
        self.snapshots[directive.name] = Remembered(model, self.plan, self.forward_macs)
        self._state_changes += 1

    def _snapshot(self, name: str) -> Remembered:
        found = self.snapshots.get(name)
        if found is None:
            known = ", ".join(sorted(self.snapshots)) or "none"
            raise ConfigError(f"there is no snapshot {name!r}; taken so far: {known}")
        return found

    @property
    def _seed(self) -> int:
        return self.settings.seed * 1_000_003 + self._state_changes

    def checkpoint(self, folder: Path) -> None:
        models = {"model": Remembered(self.model, self.plan, self.forward_macs)}
        if self._target is not None:
            models["target"] = self._target
        if self._averaged is not None:
            models["average"] = Remembered(self._averaged, self.plan, self.forward_macs)
        models |= {f"snapshot-{name}": kept for name, kept in self.snapshots.items() if not kept.foreign}
        plan, optimizer = self.shrinking.base_plan, self.shrinking.optimizer
        write_state(folder, models, plan, self.model, optimizer, self._state_changes, self._done)

    def restore(self, folder: Path) -> None:
        counters = read_counters(folder)
        base_plan, source = read_base(folder), self.origin.source
        if base_plan.model != source:
            raise JournalError(f"{folder} is of the model {base_plan.model.name!r}, not {source.name!r}")
        models: dict[str, Remembered] = {}
        for name, macs in counters.models.items():
            model, plan = rebuild_model(folder / name, lambda: self.origin.build(source))
            models[name] = Remembered(model.to(self.settings.training.device), plan, macs)
        self.shrinking.become(base_plan, models["model"].model, models["model"].plan)
        self._target = models.get("target")
        self._averaged = models["average"].model if "average" in models else None
        for name, saved in models.items():
            if name.startswith("snapshot-"):
                saved.model.eval()
                self.snapshots[name.removeprefix("snapshot-")] = saved
        if counters.optimizer is not None:
            restore_optimizer(folder, counters, self.model, self.optimizer)
        self._state_changes, self._done = counters.state_changes, counters.done
