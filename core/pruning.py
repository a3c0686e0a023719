"""The main job: settings in, a verified smaller model in a run folder out. Commands and scripts call this."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np

from prunus.core import latency_target
from prunus.core.adapter import Description, IdentifiedSession, OpenSession, Session, SharedSession
from prunus.core.allocation import raise_if_unreachable
from prunus.core.budget import Budget
from prunus.core.checkpoints import Checkpoints
from prunus.core.cost import Cost
from prunus.core.digest import digest
from prunus.core.directives import Directive, Observation, Snapshot
from prunus.core.errors import ConfigError, JournalError
from prunus.core.files import write_atomically
from prunus.core.history import History
from prunus.core.importance import ImportanceEstimator
from prunus.core.interrupts import Interrupts
from prunus.core.journal import Journal
from prunus.core.plugin_settings import configure, resolved
from prunus.core.policy import PruningPolicy, PruningTask, ask
from prunus.core.registry import Registry
from prunus.core.report import Report, make_report
from prunus.core.report_page import write_page
from prunus.core.run import Preamble, execute
from prunus.core.run_folder import RunFolder
from prunus.core.run_lock import RunLock
from prunus.core.settings import RunSettings
from prunus.core.signals import NEEDS_DATA, NEEDS_LABELS, Signal
from prunus.core.tracking import TrackedSession, Tracker, Tracking

DEFAULT_IMPORTANCE = "magnitude"


class Display(Protocol):
    """Who shows the run to its user."""

    def opened(self, description: Description, settings: RunSettings, budget: Budget) -> None:
        """Model and data are there, the targets can be reached; work begins."""
        ...

    def began(self, index: int, directive: Directive) -> None: ...

    def answered(self, index: int, directive: Directive, observation: Observation) -> None: ...

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None: ...

    def notice(self, text: str) -> None: ...


class Silent:
    """A display for callers who show the run themselves, or not at all."""

    def opened(self, description: Description, settings: RunSettings, budget: Budget) -> None: ...

    def began(self, index: int, directive: Directive) -> None: ...

    def answered(self, index: int, directive: Directive, observation: Observation) -> None: ...

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None: ...

    def notice(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Method:
    """The policy and, where it ranks by one, its estimator, ready to run."""

    policy: PruningPolicy
    estimator: ImportanceEstimator | None

    @property
    def needs(self) -> frozenset[Signal]:
        return self.policy.needs | (self.estimator.needs if self.estimator is not None else frozenset())

    def resolved(self, settings: RunSettings) -> RunSettings:
        """`settings` with every plugin setting spelled out."""
        update: dict[str, object] = {"config": resolved(self.policy.config)}
        if self.estimator is not None:
            name = settings.importance or DEFAULT_IMPORTANCE
            update |= {"importance": name, "importance_config": resolved(self.estimator.config)}
        return settings.model_copy(update=update)


def find_method(settings: RunSettings, registry: Registry) -> Method:
    """The method that `settings` name, configured. Mistakes are found here, before any model is opened."""
    policy_class = registry.policy(settings.plugin)
    policy = policy_class(configure(policy_class.Config, settings.plugin, settings.config))
    if not policy.needs_estimator:
        if settings.importance is not None or settings.importance_config:
            raise ConfigError(
                f"{settings.plugin} ranks units by itself and takes no --importance (got {settings.importance!r});"
                " use it with one-shot or iterative",
                key="importance",
            )
        return Method(policy, None)
    name = settings.importance or DEFAULT_IMPORTANCE
    estimator_class = registry.estimator(name)
    estimator = estimator_class(configure(estimator_class.Config, name, settings.importance_config))
    return Method(policy, estimator)


_STOPPING = (
    "stopping when the step in flight is done; Ctrl-C again stops at once (the run can be resumed either way)"
)


@dataclass(slots=True)
class _Following:
    """The run's events: kept in the history, shown, and the dense model tested when it is ready."""

    session: Session
    folder: RunFolder
    history: History
    display: Display
    interrupts: Interrupts
    tracking: Tracking

    def began(self, index: int, directive: Directive) -> None:
        self.interrupts.check()
        self.display.began(index, directive)

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None:
        if isinstance(directive, Snapshot) and directive.name == "dense":
            tested = self.session.test()
            self.folder.write_json("dense.json", {"accuracy": tested.accuracy if tested is not None else None})

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None:
        note = self.history.add(index, directive, observation, seconds)
        self.tracking.answered(self.history.rows[-1], directive, observation)
        self.display.answered(index, directive, observation)
        if note is not None:
            self.display.notice(note)

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        self.display.progress(label, done, total, loss, lr)
        self.tracking.progress(label, done, total, loss, lr)
        self.interrupts.check()

    def notice(self, text: str) -> None:
        self.display.notice(text)


def prune(
    settings: RunSettings,
    folder: RunFolder,
    registry: Registry,
    display: Display,
    *,
    resume: bool,
    overwrite: bool,
    open_session: OpenSession | None = None,
) -> Report:
    """Run to the end, or on from where the folder's journal stops, and write the report.

    `open_session` replaces the adapter that the settings name: for models and data that have no name.
    Raises what section 10 of the design lists; KeyboardInterrupt after a Ctrl-C, with the run resumable.
    """
    method = find_method(settings, registry)
    with _prepared(folder, resume, overwrite):
        started = time.monotonic()
        # resolved first: a plan's provenance is the same whether the settings came from a user or a run.toml
        session = (open_session or registry.adapter(settings.adapter))(method.resolved(settings))
        settings = session.settings
        table = latency_target.timed(session, settings.parsed_targets, folder, resume)
        task = make_task(settings, method, session, latency_target.full_cost(session, table))
        display.opened(session.describe(), settings, task.budget)
        if not resume:
            folder.clear()
            write_atomically(folder.settings_file, settings.to_toml())
            if table is not None:
                latency_target.write_table(folder, table)
        history = History(folder.metrics)
        tracking = Tracking(_trackers(settings, folder, session))
        opening = time.monotonic() - started
        with Interrupts(lambda: display.notice(_STOPPING)) as interrupts:
            following = _Following(session, folder, history, display, interrupts, tracking)
            plan = execute(
                method.policy,
                task,
                session.adapter,
                plugin=settings.plugin,
                events=following,
                preamble=make_preamble(settings, method, session),
                journal=_journal(folder, settings, session),
                checkpoints=Checkpoints(folder.checkpoints),
            )
        finishing = time.monotonic()
        tested = session.test()
        tracking.result({"test/accuracy": tested.accuracy if tested is not None else None})
        report = make_report(
            run=str(folder.path),
            settings=settings,
            description=session.describe(),
            budget=task.budget,
            dense=session.graph,
            pruned=session.adapter.graph,
            dense_accuracy=_dense_accuracy(folder),
            pruned_accuracy=tested.accuracy if tested is not None else None,
            history=history,
            latency=latency_target.result(session, table, task.budget) if table is not None else None,
            seconds=opening + history.seconds + time.monotonic() - finishing,
        )
        session.save(folder.path, plan, report.for_scripts())
        write_page(report, folder.path / "report.html")
        folder.write_json("report.json", report.model_dump(mode="json", by_alias=True))
        if isinstance(session, SharedSession):
            session.dismiss()
        return report


def _trackers(settings: RunSettings, folder: RunFolder, session: Session) -> Sequence[Tracker]:
    if not settings.track:
        return ()
    if not isinstance(session, TrackedSession):
        raise ConfigError(f"the adapter {settings.adapter!r} knows no trackers", key="track")
    return session.trackers(folder.path.name, folder.trackers)


def follow(settings: RunSettings, registry: Registry) -> None:
    """Take part in the job of several processes whose first one runs `prune` with the same settings.

    Returns when that has ended well. Raises ConfigError if the adapter works in one process only,
    ProcessError if another process ends before.
    """
    session = registry.adapter(settings.adapter)(find_method(settings, registry).resolved(settings))
    if not isinstance(session, SharedSession):
        raise ConfigError(f"the adapter {settings.adapter!r} works in one process only", key="adapter")
    with Interrupts():  # a stop is for the first process to answer; this one ends with it
        session.follow()


@contextlib.contextmanager
def _prepared(folder: RunFolder, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder, checked and locked. A new run that fails before its journal begins leaves nothing behind."""
    if resume:
        with RunLock(folder.path):
            folder.sweep()
            yield
        return
    fresh = not folder.path.exists()
    folder.check(overwrite)
    folder.path.mkdir(parents=True, exist_ok=True)
    with RunLock(folder.path):
        folder.sweep()
        try:
            yield
        except BaseException:
            if fresh and not folder.journal.exists():
                folder.discard()
            raise


def make_task(settings: RunSettings, method: Method, session: Session, whole: Cost) -> PruningTask:
    """What the policy is told; `whole` is what shares in targets are shares of.

    Raises ConfigError where the method lacks data or refuses, UnreachableTargetError for an impossible target.
    """
    _check_data(settings, method, session)
    graph = session.graph
    budget = Budget.resolve(settings.parsed_targets, whole)
    raise_if_unreachable(graph, budget)
    if not (graph.prunable or graph.blocks or graph.kernels):
        raise ConfigError("nothing of this model can be removed (optimize inspect says why)", key="model")
    images = session.describe().images
    task = PruningTask(
        graph=graph,
        budget=budget,
        rng=np.random.default_rng(settings.seed),
        estimator=method.estimator,
        epochs=(settings.epochs or 0.0) if session.has_data else 0.0,
        recovery_lr=settings.recovery_lr,
        recovery_base_lr=settings.recovery_base_lr,
        has_data=session.has_data,
        has_labels=session.has_labels,
        teachers=session.teachers,
        held_out=images.get("holdout"),
        calibration=images.get("calibration"),
        classes=session.classes,
    )
    ask(method.policy, settings.plugin, task)
    return task


def _check_data(settings: RunSettings, method: Method, session: Session) -> None:
    if session.has_data:
        if not session.has_labels and method.estimator is not None:
            _check_labels(settings, method.estimator)
        return
    if method.policy.starts_from == "scratch":
        raise ConfigError(f"{settings.plugin} trains from scratch and needs data; --data is none", key="data")
    lacking = sorted(signal.value for signal in method.needs & NEEDS_DATA)
    if lacking:
        who = settings.plugin if method.policy.needs & NEEDS_DATA else f"importance {settings.importance}"
        raise ConfigError(
            f"{who} measures {', '.join(lacking)} and needs data; --data is none (try --plugin one-shot "
            "--importance magnitude)",
            key="data",
        )


def _check_labels(settings: RunSettings, estimator: ImportanceEstimator) -> None:
    lacking = sorted(signal.value for signal in estimator.needs & NEEDS_LABELS)
    if lacking:
        raise ConfigError(
            f"importance {settings.importance} measures {', '.join(lacking)} and needs labels; "
            f"{settings.data} has none (try --importance magnitude)",
            key="importance",
        )


def make_preamble(settings: RunSettings, method: Method, session: Session) -> Preamble | None:
    """What comes before the policy; None where there is nothing to train or judge by."""
    if method.policy.starts_from == "scratch" or not session.has_data:
        return None
    epochs = settings.dense_epochs if session.dense_needs_training else None
    return Preamble(dense_epochs=epochs or 0.0, evaluate=session.has_labels)


def _journal(folder: RunFolder, settings: RunSettings, session: Session) -> Journal:
    follows_from = settings.model_dump(mode="json", exclude={"trust", "workers", "threads", "track"})
    content = session.content() if isinstance(session, IdentifiedSession) else None
    belongs_to = digest({"settings": follows_from, "graph": session.graph.fingerprint, "content": content})
    if (folder.journal / "head.json").exists():
        return Journal.open(folder.journal, prunus_version(), belongs_to)
    return Journal.create(folder.journal, prunus_version(), belongs_to)


def _dense_accuracy(folder: RunFolder) -> float | None:
    """None where the method starts from scratch: there was no dense model to test."""
    if not (folder.path / "dense.json").exists():
        return None
    accuracy = folder.read_json("dense.json").get("accuracy")
    if accuracy is not None and not isinstance(accuracy, float):
        raise JournalError(f"{folder.path / 'dense.json'} is damaged: accuracy is {accuracy!r}")
    return accuracy


def prunus_version() -> str:
    """The installed version, or "unknown" in a bare checkout."""
    try:
        return version("prunus")
    except PackageNotFoundError:
        return "unknown"
