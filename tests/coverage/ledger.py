"""The sweep's results: benchmarks/coverage.json, one record per model, and the table made from it."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from families import TOO_LARGE

from prunus.core.files import write_atomically

FOLDER = Path(__file__).parents[2] / "benchmarks"
RECORDS, TABLE = FOLDER / "coverage.json", FOLDER / "coverage.md"
VERSIONS = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
TOLERANCE = 1e-4


def read() -> dict[str, dict[str, Any]]:
    if not RECORDS.exists():
        return {}
    kept: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())["models"]
    return kept


def add(record: Mapping[str, Any]) -> None:
    """Adds or replaces one record; shards may do so at the same time."""
    with _alone():
        models = {**read(), record["model"]: {**record, "versions": VERSIONS}}
        ordered = {name: models[name] for name in sorted(models)}
        write_atomically(RECORDS, json.dumps({"models": ordered}, indent=1) + "\n")
        write_atomically(TABLE, table(ordered))


@contextmanager
def _alone() -> Iterator[None]:
    FOLDER.mkdir(exist_ok=True)
    lock = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def faults(record: Mapping[str, Any]) -> list[str]:
    """What of the promise is not kept, in words; empty where all is."""
    if "error" not in record:
        return [str(record.get("fault", "no result"))]
    found = []
    worst = max(record["error"], record["probe_error"])
    if not worst <= TOLERANCE:
        found.append(f"masked and pruned differ by {worst:.1e}")
    if record["pruned_to"] > 0.5 and record["reachable"] <= 0.5:
        found.append(f"50% is reachable but {record['pruned_to']:.1%} was reached")
    for key in ("cost_exact", "pruned_cost_exact", "replayed", "backward"):
        if not record[key]:
            found.append(key.replace("_", " ") + ": no")
    return found


def passed(record: Mapping[str, Any] | None) -> bool:
    return record is not None and not faults(record) and record.get("versions") == VERSIONS


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    good = [r for r in models.values() if not faults(r)]
    older = sum("error" in r and "gradients" not in r for r in models.values())
    lines = [
        "# Coverage",
        "",
        f"{len(good)} of {len(models)} models: traced, pruned, proven, replayed. Written by `pytest -m coverage`.",
        "",
        "Error: masked against pruned, relative to the largest output, the worst of 50% of the MACs and two seeds",
        "of random shares (25 to 95% of each group). Reachable: the smallest share of the MACs a plan may keep.",
        "Seconds: tracing and certification (random removals tried on copies), one core. Cost:",
        "predicted MACs and parameters equal the measured ones, before and after (after: parameters alone, where",
        "the number of proposals depends on the weights, in detection). Replay: the plan on a fresh",
        "instance gives the same model bit for bit. Backward: in train mode every parameter that had a gradient",
        "before the removal has one after it, and it is finite. Peak: of tracing and certification, with the",
        "interpreter's 0.7 GiB; in brackets of the whole examination.",
        "",
        f"* {older} records are from before gradients were compared by name: in them, backward means finite ones.",
        "Where one peak is given, it is that of the whole examination.",
        "",
        f"Not swept, since smaller models of the same builders are: {', '.join(TOO_LARGE)}.",
        "",
        "| model | params (M) | groups | seconds (trace) | peak GiB | reachable | pruned to | error "
        "| cost | replay | backward | locked |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(_row(record) for record in models.values())
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> str:
    if "error" not in record:
        return f"| {record['model']} |" + " |" * 10 + f" **{faults(record)[0][:200]}** |"
    yes = {True: "yes", False: "**no**"}
    peak = f"{record['peak_gib']:.1f}"
    cells = [
        record["model"] + ("" if "gradients" in record else " *"),
        f"{record['params'] / 1e6:.2f}",
        str(record["groups"]),
        f"{record['seconds']:.1f} ({record['trace_seconds']:.1f})",
        f"{record['trace_gib']:.1f} ({peak})" if "trace_gib" in record else peak,
        f"{record['reachable']:.1%}",
        f"{record['pruned_to']:.1%}",
        f"{max(record['error'], record['probe_error']):.0e}",
        yes[record["cost_exact"] and record["pruned_cost_exact"]],
        yes[record["replayed"]],
        yes[record["backward"]],
        "; ".join(f"{count} x {reason}" for reason, count in _reasons(record).items()).replace("|", "/"),
    ]
    return "| " + " | ".join(cells) + " |"


def _reasons(record: Mapping[str, Any]) -> dict[str, int]:
    """reason -> groups; reasons that differ in a number alone (of a block, of an error) count as one."""
    found: dict[str, int] = {}
    for reason, count in record["locked"].items():
        plain = re.sub(r"\d[\d.e+-]*(?=[ ,.]|$)", "*", reason)
        found[plain] = found.get(plain, 0) + count
    return found
