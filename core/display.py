"""What people see: progress on stderr while it runs, tables on stdout when it is done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from prunus.core.adapter import Description
from prunus.core.budget import Budget
from prunus.core.directives import (
    Changed,
    Directive,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Merge,
    Observation,
    Remove,
    Train,
    Trained,
)
from prunus.core.finished import uses
from prunus.core.report import Depth, Report, Size, Width
from prunus.core.settings import RunSettings

_BAR = 24


class RunDisplay:
    """A live progress line for the directive in flight, and one line for each that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def opened(self, description: Description, settings: RunSettings, budget: Budget) -> None:
        size = "x".join(str(n) for n in description.input_size)
        facts = Table.grid(padding=(0, 2))
        classes = f"  input {size}, {description.classes or '?'} classes"
        facts.add_row("model", Text.assemble((description.model, "bold"), classes))
        facts.add_row("data", Text(f"{description.data}  {_images(description)}".rstrip()))
        by = f" by {settings.importance}" if settings.importance else ""
        facts.add_row("method", Text(settings.plugin + by))
        dense = f"{human(budget.dense.macs)} MACs, {human(budget.dense.params)} parameters"
        facts.add_row("target", Text(f"{', '.join(settings.targets)}  of {dense}"))
        self._console.print(Panel(facts, title="prunus", expand=False))
        for note in description.notes:
            self.notice(note)

    def began(self, index: int, directive: Directive) -> None:
        self._show(_doing(directive), 0, None, "")

    def answered(self, index: int, directive: Directive, observation: Observation) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        line = _done(directive, observation)
        if line:
            self._console.print(Text("  " + line))

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        detail = "" if loss is None else f"loss {loss:.3f}"
        self._show(label, done, total, detail + ("" if lr is None else f"  lr {lr:.4f}"))

    def notice(self, text: str) -> None:
        self._console.print(Text(f"  note: {text}", style="yellow"))

    def _show(self, label: str, done: int, total: int | None, detail: str) -> None:
        count = "" if total is None else f"{done}/{total}"
        if self._task is None:
            self._task = self._progress.add_task(label, total=total, completed=done, detail=detail, count=count)
        else:
            self._progress.update(
                self._task, description=label, total=total, completed=done, detail=detail, count=count
            )


def _images(description: Description) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in description.images.items() if count)


def _doing(directive: Directive) -> str:
    if isinstance(directive, Train):
        return directive.label
    if isinstance(directive, Measure):
        return "measure " + ", ".join(sorted(signal.value for signal in directive.signals))
    if isinstance(directive, Remove):
        return "remove and check" if directive.refit == "none" else f"remove, refit ({directive.refit}) and check"
    if isinstance(directive, Evaluate) and directive.within is not None:
        return "try a smaller network"
    return type(directive).__name__.lower()


def _done(directive: Directive, observation: Observation) -> str:
    """One line for what a person wants to follow; nothing for the small steps in between."""
    if isinstance(directive, Train) and isinstance(observation, Trained):
        accuracy = "" if observation.accuracy is None else f", accuracy {observation.accuracy:.2%}"
        return f"{directive.label}: {directive.epochs:g} epochs, loss {observation.loss:.4f}{accuracy}"
    if isinstance(directive, Evaluate) and isinstance(observation, Evaluated):
        if directive.within is not None or directive.gates is not None:
            return ""
        what = directive.model or "model"
        return f"held-out accuracy of the {what}: {observation.accuracy:.2%} (loss {observation.loss:.4f})"
    if isinstance(directive, Remove | Grow | Merge) and isinstance(observation, Changed):
        cost, check = observation.graph.cost(), observation.verification
        verb = _changed(directive)
        proof = "not checked" if check.kind == "skipped" else f"largest difference {check.max_error:.1e}"
        return f"{verb} {human(cost.macs)} MACs, {human(cost.params)} parameters ({proof})"
    return ""


def _changed(directive: Remove | Grow | Merge) -> str:
    if isinstance(directive, Merge):
        return "merged into"
    if isinstance(directive, Grow):
        return f"{len(directive.branches)} convolutions branched:" if directive.branches else "grown to"
    gone = [*directive.blocks, *(f"kernel of {name}" for name in directive.kernels)]
    return f"removed {', '.join(gone)}, down to" if gone else "removed down to"


def summary(report: Report) -> RenderableType:
    """The finished run: before and after, widths by stage, the proof, where it lies and what to do next."""
    next_steps = Table.grid(padding=(0, 2))
    next_steps.add_column()
    next_steps.add_column(overflow="fold")
    for what, how in uses(report).items():
        if what != "export":
            next_steps.add_row(what, Text(how))
    lines: list[RenderableType] = [_sizes(report), _stages(report.widths)]
    lines += [Text(sentence) for sentence in whole_layers(report.depth)]
    lines.append(Text(proof(report)))
    if report.latency is not None:
        lines.append(Text(report.latency.message[:1].upper() + report.latency.message[1:] + "."))
    lines += [Text(f"Note: {note}.", style="yellow") for note in report.notes]
    lines += [Text(f"Run folder: {report.run} ({report.seconds:.0f} s)"), next_steps]
    return Group(*lines)


def whole_layers(depth: Depth) -> list[str]:
    """Sentences on the blocks and kernels that went; none if all are there."""
    said = []
    if depth.removed:
        said.append(f"Blocks removed: {len(depth.removed)} of {depth.blocks} ({', '.join(depth.removed)}).")
    if depth.reduced:
        said.append(f"Kernels now 1 x 1: {len(depth.reduced)} of {depth.kernels} ({', '.join(depth.reduced)}).")
    return said


def proof(report: Report) -> str:
    """The verification in one sentence."""
    check = report.verification
    if check.kind == "skipped":
        return "Not verified: pruned and masked outputs were not compared."
    how = "" if check.kind == "exact" else ", norm statistics over the kept units"
    relative = check.max_error / max(check.scale, 1e-12)
    return (
        f"Verified: pruned and masked outputs differ by at most {check.max_error:.1e} "
        f"({relative:.1e} of their scale{how})."
    )


def _sizes(report: Report) -> Table:
    heading = Text(f"{report.model} by {report.plugin}", style="table.title")
    table = Table(title=heading, title_justify="left")
    for column in ("", "before", "after", "kept", "target"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("MACs", "macs"), ("parameters", "params"), ("size", "bytes")]
    for title, key in rows:
        before, after = getattr(report.dense, key), getattr(report.pruned, key)
        unit = "B" if key == "bytes" else ""
        limit = report.limits.get(key)
        met = "" if limit is None else f"{human(limit, unit)} {'met' if after <= limit else 'MISSED'}"
        table.add_row(title, human(before, unit), human(after, unit), f"{after / max(before, 1):.1%}", met)
    table.add_row("test accuracy", _accuracy(report.dense), _accuracy(report.pruned), _change(report), "")
    return table


def _accuracy(size: Size) -> str:
    return "-" if size.accuracy is None else f"{size.accuracy:.2%}"


def _change(report: Report) -> str:
    if report.dense.accuracy is None or report.pruned.accuracy is None:
        return ""
    return f"{100 * (report.pruned.accuracy - report.dense.accuracy):+.2f} pts"


def _stages(widths: Sequence[Width]) -> Table:
    table = Table(title="Widths by stage", title_justify="left")
    for column in ("stage", "groups", "units", "kept", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for stage, members in by_stage(widths):
        units, kept = sum(w.units for w in members), sum(w.kept for w in members)
        table.add_row(Text(stage), str(len(members)), str(units), str(kept), bar(kept / max(units, 1)))
    return table


def by_stage(widths: Iterable[Width]) -> list[tuple[str, list[Width]]]:
    """Groups by the stage their name begins with: "layer1", "blocks.3", in the order of the model."""
    stages: dict[str, list[Width]] = {}
    for width in widths:
        parts = width.name.split(".")
        indexed = len(parts) > 2 and re.fullmatch(r"\d+", parts[1]) and not re.search(r"\d$", parts[0])
        stages.setdefault(".".join(parts[: 2 if indexed else 1]), []).append(width)
    return list(stages.items())


def bar(share: float, width: int = _BAR) -> str:
    """A share as a bar of blocks."""
    filled = round(share * width)
    return "█" * filled + "░" * (width - filled) + f" {share:.0%}"


def human(number: float, unit: str = "") -> str:
    """1234567 as "1.23 M", with the unit joined: "1.23 MB"."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """90 as "90 s", 600 as "10 min", 9000 as "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
