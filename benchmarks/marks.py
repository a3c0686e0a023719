"""The tables of the README, of benchmarks/README.md and of joint_search.md, from the cells that are committed.

    python -m benchmarks.marks

Margins are paired: seeds that both have, and cells that start from the same dense network, or from none. Of our
methods the one that is best on the held-out part is taken, of the rivals the one that is best on test, each among
those with enough seeds (`ENOUGH`, core/compare_table.py). Figures of fewer seeds than the protocol has show their
number in brackets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from prunus.core.compare_protocol import Teaching, read_protocol
from prunus.core.compare_record import CellRecord, ResultsFolder
from prunus.core.compare_table import Results, alike, best_held_out, with_enough_seeds

HERE = Path(__file__).parent
MARKS: dict[float, dict[str, float]] = {
    0: {"macs=50%": 9, "macs=25%": 50, "macs=10%": 55},
    1.5: {"macs=50%": 0.3, "macs=25%": 1.5, "macs=10%": 3.0},
    6: {"macs=50%": 0.2, "macs=25%": 0.5, "macs=10%": 1.0},
    20: {"macs=50%": 0, "macs=25%": 0, "macs=10%": 0},
}
"""epochs of recovery -> target -> points that were asked for."""
PRUNING = ("gsm-anneal", "bayes-reparam")
SEARCH = (
    "joint-search",
    "joint-search higher rate",
    "joint-search fewer blocks",
    "joint-search fewer blocks clipped",
)
DEPTHS = {
    "all blocks": "joint-search",
    "three of four gone": "joint-search fewer blocks",
    "the same, gradients limited": "joint-search fewer blocks clipped",
}
"""Row of joint_search.md's table -> its entry."""
NARROW = ("narrow equal MACs",)
L2 = ("TP L2 uniform", "TP L2 uniform low rates")


@dataclass(frozen=True, slots=True)
class Contest:
    """Some entries of ours against some rivals."""

    name: str
    ours: tuple[str, ...]
    rivals: tuple[str, ...]
    teaching: Teaching = "plain"


def results_of(name: str) -> Results:
    """A committed comparison, by the name of its protocol."""
    protocol = read_protocol(HERE / "protocols" / f"{name}.toml")
    return Results(protocol, tuple(ResultsFolder(HERE / "results" / name).read_all(protocol)), again="")


def torch_pruning(results: Results) -> tuple[str, ...]:
    return tuple(entry.name for entry in results.protocol.entries if entry.name.startswith("TP "))


def marks_table(results: Results) -> str:
    """What was asked for, and the margins that were reached; bold where they reach it."""
    targets = results.targets
    rows = [["", *(_share(target) for target in targets)], ["---"] * (1 + len(targets))]
    for epochs, asked in MARKS.items():
        budget = f"{epochs:g} epochs" if epochs else "no recovery"
        rows.append([f"**{budget}**: mark", *(f"{asked[target]:g}" for target in targets)])
        for contest in _contests(results):
            cells = [_margin(results, contest, target, epochs, asked[target]) for target in targets]
            if any(cells):
                rows.append([contest.name, *cells])
    return _markdown(rows)


def margins_table(networks: dict[str, Results], columns: Sequence[tuple[float, str]]) -> str:
    """What was reached on other networks, where no mark was asked for."""
    headings = [f"{epochs:g} epochs, {_share(target)}" for epochs, target in columns]
    rows = [["", *headings], ["---"] * (1 + len(columns))]
    for name, results in networks.items():
        for contest in _contests(results):
            cells = [_margin(results, contest, target, epochs, float("inf")) for epochs, target in columns]
            if any(cells):
                rows.append([f"{name}: {contest.name}", *cells])
    return _markdown(rows)


def _contests(results: Results) -> tuple[Contest, ...]:
    rivals = torch_pruning(results)
    return (
        Contest("pruning the dense model, against torch-pruning", PRUNING, rivals),
        Contest("the same, the dense model teaching on both sides", PRUNING, rivals, "distilled"),
        Contest("joint-search, against torch-pruning", SEARCH, rivals),
        Contest("joint-search, against the narrow network", SEARCH, NARROW),
    )


def depth_table(results: Results) -> str:
    """joint-search with all blocks and with fewer against the narrow network, wherever it is trained."""
    places = [(epochs, target) for epochs in MARKS if epochs for target in results.targets]
    rows = [["", *(f"{e:g} epochs, {_share(t)}" for e, t in places)], ["---"] * (1 + len(places))]
    for name, entry in DEPTHS.items():
        contest = Contest(name, (entry,), NARROW)
        rows.append([name, *(_margin(results, contest, t, e, float("inf")) for e, t in places)])
    return _markdown(rows)


def _margin(results: Results, contest: Contest, target: str, epochs: float, asked: float) -> str:
    differences = margin(results, contest, target, epochs)
    if not differences:
        return ""
    # two decimals are shown, and they decide
    points = round(100 * fmean(differences), 2)
    return _counted(f"**{points:+.2f}**" if points >= asked else f"{points:+.2f}", len(differences), results)


def margin(results: Results, contest: Contest, target: str, epochs: float) -> list[float]:
    """Accuracy on test, ours minus the rival's, seed by seed; empty where nothing can be paired."""

    def cells(names: Sequence[str]) -> list[list[CellRecord]]:
        found = (results.of(name, target, epochs, contest.teaching) for name in names)
        return [group for group in found if group]

    ours = best_held_out(cells(contest.ours))
    mine = {record.seed: record for record in ours}
    paired = [[r for r in g if r.seed in mine and alike(mine[r.seed], r)] for g in cells(contest.rivals)]
    rival = max(with_enough_seeds(paired), key=accuracy, default=[])
    return [accuracy([mine[record.seed]]) - accuracy([record]) for record in rival]


def accuracy(group: Sequence[CellRecord]) -> float:
    """Mean on test."""
    return fmean(record.outcome.accuracy for record in group if record.outcome)


ROWS: dict[str, tuple[str, ...]] = {
    "gsm-anneal": ("gsm-anneal",),
    "bayes-reparam": ("bayes-reparam",),
    "joint-search": ("joint-search",),
    "joint-search, three of four blocks gone": ("joint-search fewer blocks",),
    "torch-pruning, L2, uniform, its better rates": L2,
    "torch-pruning, the best of all others": (),
    "uniformly narrow, from scratch": NARROW,
}
"""Row of a table of accuracies -> the entries whose best on test it shows; (): torch-pruning's in no other row."""


def accuracies_table(results: Results, columns: Sequence[tuple[float, Sequence[str]]]) -> str:
    """Mean accuracy on test in %; a column is a budget and its targets, in bold the best of each."""
    others = tuple(name for name in torch_pruning(results) if name not in L2)
    places = [(epochs, target) for epochs, targets in columns for target in targets]
    found = {
        (name, *place): _best_of(results, entries or others, *place)
        for name, entries in ROWS.items()
        for place in places
    }
    best = {
        place: max((round(accuracy(g), 4) for n in ROWS if (g := found[n, *place])), default=None)
        for place in places
    }
    rows = [["", *(_heading(epochs, targets) for epochs, targets in columns)], ["---"] * (1 + len(columns))]
    for name in ROWS:
        cells = [
            _cell(results, [(found[name, epochs, target], best[epochs, target]) for target in targets])
            for epochs, targets in columns
        ]
        if any(cells):
            rows.append([name, *cells])
    return _markdown(rows)


def _best_of(results: Results, entries: Sequence[str], epochs: float, target: str) -> list[CellRecord]:
    groups = (results.of(entry, target, epochs, "plain") for entry in entries)
    return max(filter(None, groups), key=accuracy, default=[])


def _heading(epochs: float, targets: Sequence[str]) -> str:
    budget = f"{epochs:g} epochs" if epochs else "no recovery"
    return f"{budget}, {' / '.join(_share(target) for target in targets)}"


def _cell(results: Results, values: Sequence[tuple[Sequence[CellRecord], float | None]]) -> str:
    """The values of some targets; seeds are told once where all have the same."""
    if not any(group for group, _ in values):
        return ""
    texts = [_value(group, best) for group, best in values]
    seeds = {len(group) for group, _ in values}
    if len(seeds) == 1:
        return _counted(" / ".join(texts), seeds.pop(), results)
    counted = (_counted(t, len(g), results) if g else t for t, (g, _) in zip(texts, values, strict=True))
    return " / ".join(counted)


def _value(group: Sequence[CellRecord], best: float | None) -> str:
    if not group:
        return "·"
    text = f"{100 * accuracy(group):.2f}"
    return f"**{text}**" if round(accuracy(group), 4) == best else text


def _counted(text: str, seeds: int, results: Results) -> str:
    return text if seeds == len(results.protocol.seeds) else f"{text} ({seeds})"


def _share(target: str) -> str:
    return target.removeprefix("macs=")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def tables() -> dict[str, tuple[str, ...]]:
    """Document, from the top of the repository -> the tables that it shows."""
    fast, small, mobile = (results_of(name) for name in ("fashion_fast", "resnet20", "mobilenetv3"))
    every, hard = ("macs=50%", "macs=25%", "macs=10%"), ("macs=25%", "macs=10%")
    return {
        "benchmarks/README.md": (
            marks_table(fast),
            margins_table({"ResNet-20": small, "MobileNetV3": mobile}, [(e, t) for e in (1.5, 6) for t in hard]),
        ),
        "benchmarks/results/joint_search.md": (depth_table(fast),),
        "README.md": (
            accuracies_table(fast, [(epochs, every) for epochs in MARKS]),
            accuracies_table(small, [(1.5, hard), (6, hard)]),
            accuracies_table(mobile, [(1.5, hard), (6, hard)]),
        ),
    }


if __name__ == "__main__":
    for document, shown in tables().items():
        print(f"{document}\n\n" + "\n".join(shown))
