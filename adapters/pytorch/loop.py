"""Pruning inside a training loop that belongs to the user: `begin`, and the run that the loop calls.

    run = begin(model, example_inputs, plugin="gsm-anneal", target="macs=50%", optimizer=optimizer,
                train_data=loader, epochs=10)
    while not run.done:
        for images, labels in loader:
            loss = run.distil(criterion(logits := model(images), labels), logits, images, labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            run.step(loss)
        run.epoch()
    run.save("runs/mine")

The method's directives are carried out between two steps, but for `Train`: that is what the loop is for.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunus.adapters.pytorch.api import objects_settings, session_of
from prunus.adapters.pytorch.comparison import evaluating
from prunus.adapters.pytorch.handlers import install_handlers
from prunus.adapters.pytorch.loop_piece import Piece
from prunus.adapters.pytorch.optimizer_trial import refuse_stuck
from prunus.adapters.pytorch.schedule import total_steps
from prunus.adapters.pytorch.session import PyTorchSession
from prunus.adapters.pytorch.user_data import GIVEN
from prunus.adapters.pytorch.weights import tensors_of
from prunus.core.budget import Budget
from prunus.core.directives import Directive, Observation, Snapshot, Train, Trained
from prunus.core.errors import ConfigError, TrainingError
from prunus.core.files import write_atomically
from prunus.core.history import History
from prunus.core.plan import PruningPlan
from prunus.core.pruning import find_method, make_preamble, make_task
from prunus.core.registry import Registry
from prunus.core.report import Report, make_report
from prunus.core.report_page import write_page
from prunus.core.run import Conducted, conduct
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What `LoopRun.finish` gives back."""

    model: nn.Module
    """The object that was given to `begin`, smaller, in the mode that the loop left it in."""
    plan: PruningPlan
    report: Report


class LoopRun:
    """A run whose trainings are the user's. Make it with `begin`.

    The model, the optimizer and the moving average stay the same objects; their *parameters* are replaced at
    each removal, inside the optimizer's groups, too. So a loop must not keep lists of parameters over a
    `step()`. Schedulers and gradient scalers refer to the optimizer and go on as they are.
    """

    def __init__(
        self, session: PyTorchSession, settings: RunSettings, budget: Budget, steps: Conducted, kept: _Kept
    ) -> None:
        """`begin` does this."""
        self._session, self._settings, self._budget = session, settings, budget
        self._steps, self._kept = steps, kept
        self._adapter = session.adapter
        self._piece: Piece | None = None
        self._plan: PruningPlan | None = None
        self._in_epoch = 0
        self._advised = False
        self._started = time.monotonic()
        self._advance(None)

    @property
    def done(self) -> bool:
        """True once the method has ended: the model has its final shape and weights."""
        return self._plan is not None

    @property
    def wants(self) -> Train | None:
        """What the method wants of the steps to come: epochs, learning rate, gates, teachers. None when done.

        Gates, decay, limits of gradients and a moving average of the method's own are the run's work; `lr` and
        teachers are yours: see `lr` and `distil`. `Train(within=...)`, training inside a smaller network
        (joint-search), is never seen here: the run carries it out itself, on `train_data`, in a call of `step`.
        """
        return self._piece.directive if self._piece is not None else None

    @property
    def lr(self) -> float | None:
        """The learning rate that the method's schedule has for the next step; None when done.

        Only advice: set it in your optimizer, or let your own scheduler rule.
        """
        assert self._settings.lr is not None
        return self._piece.learning_rate(self._settings.lr) if self._piece is not None else None

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user of the command line would have been shown."""
        return tuple(self._kept.notices)

    def distil(self, loss: Tensor, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`loss` with what the method's teachers say mixed in; just `loss` where it wants none.

        (1 - weight) loss + weight T^2 KL(teachers || model). logits: (batch, classes); labels: (batch,).
        """
        return loss if self._piece is None else self._piece.distil(loss, logits, images, labels)

    def step(self, loss: float | Tensor) -> None:
        """Call it after each step of the optimizer, with the step's loss. May prune, and may take its time.

        With gradient accumulation: once for each optimizer step. Does nothing when done. Raises TrainingError
        if the loss is NaN or infinite, and what removals raise: VerificationError, ...
        """
        piece = self._piece
        if piece is None:
            return
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            piece.hooks.close()
            raise TrainingError(f"{piece.directive.label}: the loss is {value} at step {piece.done + 1}")
        self._in_epoch += 1
        piece.stepped(value)
        if piece.done == piece.total:
            self._piece = None
            self._advance(piece.finished(self._adapter))

    def epoch(self) -> None:
        """Call it after each epoch: warns if epochs are not as long as `begin` was told."""
        counted, self._in_epoch = self._in_epoch, 0
        announced = self._kept.steps_per_epoch
        if self.done or self._advised or counted == announced:
            return
        self._advised = True
        warnings.warn(
            f"the epoch had {counted} steps, but begin() was told {announced}: the method's epochs are of "
            f"{announced} steps; set steps_per_epoch (optimizer steps, not batches)",
            stacklevel=2,
        )

    def _advance(self, answer: Trained | None) -> None:
        """Let the method go on until it wants something of the loop."""
        with evaluating(self._adapter.model):
            while True:
                try:
                    wanted = self._steps.send(answer)
                except StopIteration as end:
                    self._plan = end.value
                    return
                total = total_steps(wanted.epochs, self._kept.steps_per_epoch)
                if wanted.within is None and total > 0:
                    break
                answer = self._adapter.train(wanted)
        self._piece = Piece(wanted, total, self._kept.steps_per_epoch, self._adapter)

    def finish(self) -> Finished:
        """The pruned model, its plan and the report. Raises ConfigError if the method has not ended."""
        return Finished(self._adapter.model, self._ended(), self._report(""))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `optimize prune` writes, but for the journal; `load(folder, ...)` reads it again.

        Raises RunExistsError if there is a run and `overwrite` is false, ConfigError if this one has not ended.
        """
        plan, target = self._ended(), RunFolder(Path(folder))
        target.check(overwrite)
        target.path.mkdir(parents=True, exist_ok=True)
        target.clear()
        report = self._report(str(target.path))
        self._session.save(target.path, plan, report.for_scripts())
        write_atomically(target.settings_file, self._settings.to_toml())
        write_page(report, target.path / "report.html")
        target.write_json("report.json", report.model_dump(mode="json", by_alias=True))
        return target.path

    def _ended(self) -> PruningPlan:
        if self._plan is None:
            assert self._piece is not None
            raise ConfigError(
                f"{self._settings.plugin} has not ended: {self._piece.directive.label!r} is at step "
                f"{self._piece.done} of {self._piece.total}; train on until run.done"
            )
        return self._plan

    def _report(self, run: str) -> Report:
        tested = self._session.test()
        return make_report(
            run=run,
            settings=self._settings,
            description=self._session.describe(),
            budget=self._budget,
            dense=self._session.graph,
            pruned=self._adapter.graph,
            dense_accuracy=self._kept.dense_accuracy,
            pruned_accuracy=tested.accuracy if tested is not None else None,
            history=self._kept.history,
            seconds=time.monotonic() - self._started,
        )


class _Kept:
    """The run's events, and what is kept of them."""

    def __init__(self, session: PyTorchSession, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.history = History()
        self.dense_accuracy: float | None = None
        self.notices: deque[str] = deque(maxlen=1000)
        self._session = session

    def began(self, index: int, directive: Directive) -> None: ...

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None:
        if isinstance(directive, Snapshot) and directive.name == "dense":
            tested = self._session.test()
            self.dense_accuracy = tested.accuracy if tested is not None else None

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None:
        note = self.history.add(index, directive, observation, seconds)
        if note is not None:
            self.notice(note)

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None: ...

    def notice(self, text: str) -> None:
        self.notices.append(text)


def begin(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    optimizer: torch.optim.Optimizer,
    train_data: Any,
    epochs: float,
    plugin: str = "gsm-anneal",
    target: str | Sequence[str] = "macs=50%",
    importance: str | None = None,
    config: Mapping[str, Any] | None = None,
    holdout_data: Any = None,
    test_data: Any = None,
    steps_per_epoch: int | None = None,
    dense_epochs: float = 0.0,
    ema: nn.Module | None = None,
    **settings: Any,
) -> LoopRun:
    """Prune `model`, in place, while a loop of your own trains it with `optimizer`.

    `epochs` is the method's training budget, `dense_epochs` what the model needs before (0: it is trained).
    `train_data`, a data set of (image, label) or its DataLoader, serves the method's measurements;
    `holdout_data` is what it judges by (default: a tenth of `train_data`, which your loop should then not
    train on), `test_data` what the report says accuracy of. `steps_per_epoch` counts optimizer steps
    (default: the loader's length). `ema` is a moving average of the model that your loop keeps: a module, or a
    wrapper with `.module` (timm's ModelEmaV3, torch's AveragedModel). `example_inputs` is a batch of 2. Further
    `settings` are those of `RunSettings`: seed, min_share, lr...

    Everything that `model` needs is checked before this returns. Raises ConfigError, TraceError,
    UnreachableTargetError. A crashed loop is not resumed by the run: keep your own checkpoints.
    """
    fields = {
        **_like(optimizer),
        **settings,
        "plugin": plugin,
        "targets": (target,) if isinstance(target, str) else tuple(target),
        "importance": importance,
        "config": dict(config or {}),
        "epochs": epochs,
        "dense_epochs": dense_epochs,
    }
    device = str(next(model.parameters()).device)
    chosen = objects_settings({"device": device, **fields}, GIVEN)
    if any(wanted.quantity == "latency" for wanted in chosen.parsed_targets):
        raise ConfigError("latency targets are for prune(); in a loop of your own set macs, params or size")
    method = find_method(chosen, Registry.discover())
    chosen = method.resolved(chosen)
    steps = _steps_per_epoch(steps_per_epoch, train_data)
    _check_optimizer(optimizer, model)
    average = _average_of(ema, model)
    model.to("cpu")  # tracing happens there; the session brings it back
    with evaluating(model):
        session = session_of(
            model, example_inputs, train_data, test_data, dense_epochs == 0, chosen, holdout_data, in_place=True
        )
    session.adapter.optimizer = optimizer
    if average is not None:
        install_handlers(average, session.adapter.plan.handlers)
        session.adapter.companions.append(average)
    resolved = session.settings
    task = make_task(resolved, method, session, session.graph.cost())
    kept = _Kept(session, steps)
    preamble = make_preamble(resolved, method, session)
    conducted = conduct(method.policy, task, session.adapter, plugin=plugin, events=kept, preamble=preamble)
    return LoopRun(session, resolved, task.budget, conducted, kept)


def _like(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Settings for trainings of the run's own that resemble the user's."""
    groups = optimizer.param_groups
    return {
        "opt": "adamw" if "adam" in type(optimizer).__name__.lower() else "sgd",
        "lr": max(float(group.get("initial_lr", group["lr"])) for group in groups),
        "weight_decay": max(float(group.get("weight_decay", 0.0)) for group in groups),
    }


def _steps_per_epoch(given: int | None, train_data: Any) -> int:
    steps = given if given is not None else len(train_data) if isinstance(train_data, DataLoader) else None
    if steps is None or steps < 1:
        raise ConfigError(
            f"steps_per_epoch must be the number of optimizer steps in an epoch, at least 1, got {given}",
            key="steps_per_epoch",
        )
    return steps


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    ours = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("the optimizer trains no parameter of the model; make it from model.parameters()")
    refuse_stuck(optimizer)


def _average_of(ema: nn.Module | None, model: nn.Module) -> nn.Module | None:
    if ema is None:
        return None
    inner = getattr(ema, "module", ema)
    theirs = {name: value.shape for name, value in tensors_of(inner).items()}
    if theirs != {name: value.shape for name, value in tensors_of(model).items()}:
        raise ConfigError("ema is not an average of this model: names or shapes of its tensors differ")
    assert isinstance(inner, nn.Module)
    return inner


__all__ = ["Finished", "LoopRun", "begin"]
