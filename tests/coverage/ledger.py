"""The sweep's results: benchmarks/coverage.json, one record per model, and the table made from it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
SECONDS, GIB, LARGE = 60, 6, 300e6
"""What one model may take; models beyond `LARGE` parameters are named with what they took."""


def source() -> str:
    """The commit that a record comes from, with a + where product or sweep differ from it; "" outside of git."""
    git = ["git", "-C", str(FOLDER)]
    try:
        commit = subprocess.run([*git, "log", "-1", "--format=%h"], capture_output=True, text=True, check=True)
        paths = [str(FOLDER.parent / part) for part in ("adapters", "core", "tests/coverage")]
        changed = subprocess.run(
            [*git, "status", "--porcelain", *paths], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def read() -> dict[str, dict[str, Any]]:
    if not RECORDS.exists():
        return {}
    kept: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())["models"]
    return kept


def add(record: Mapping[str, Any]) -> None:
    """Adds or replaces one record; shards may do so at the same time."""
    with _alone():
        models = {**read(), record["model"]: {**record, "versions": VERSIONS, "source": source()}}
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
    lines = [
        "# Coverage",
        "",
        f"{len(good)} of {len(models)} models: traced, pruned, proven, replayed. Written by `pytest -m coverage`.",
        "",
        *_counts(list(models.values())),
        "",
        "Error: masked against pruned, relative to the largest output, the worst of 50% of the MACs and two seeds",
        "of random shares (25 to 95% of each group), on one image and on two (one alone where it takes more than",
        "100 G MACs). Reachable: the smallest share of the MACs a plan may keep.",
        "Seconds: of one core, for tracing and certification (random removals tried on copies). Cost:",
        "predicted MACs and parameters equal the measured ones, before and after (after: parameters alone, where",
        "the number of proposals depends on the weights, in detection). Replay: the plan on a fresh",
        "instance gives the same model bit for bit. Backward: in train mode every parameter that had a gradient",
        "before the removal has one after it, and it is finite. Peak: of tracing and certification, with the",
        "interpreter's 0.7 GiB; in brackets of the whole examination.",
        "",
        *_states(list(models.values())),
        "",
        f"Not swept, since smaller models of the same builders are: {', '.join(TOO_LARGE)}.",
        "",
        "| model | params (M) | groups | seconds (trace) | peak GiB | reachable | pruned to | error "
        "| cost | replay | backward | locked |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(_row(record) for record in models.values())
    return "\n".join(lines) + "\n"


def _counts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many models keep each promise, as a list; those that do not are named."""
    small, large = ([r for r in records if (r.get("params", 0) > LARGE) is big] for big in (False, True))
    promises = (
        (f"exact within {TOLERANCE:.0e}", records, lambda r: max(r["error"], r["probe_error"]) <= TOLERANCE),
        ("50% of the MACs or less can be reached", records, lambda r: r["reachable"] <= 0.5),
        ("25% of the MACs or less can be reached", records, lambda r: r["reachable"] <= 0.25),
        (f"traced and certified within {SECONDS} s", small, lambda r: r["seconds"] <= SECONDS),
        (f"traced and certified within {GIB} GiB", small, lambda r: r.get("trace_gib", r["peak_gib"]) <= GIB),
    )
    lines = []
    for what, asked, kept in promises:
        others = [r["model"] for r in asked if "error" not in r or not kept(r)]
        share = (len(asked) - len(others)) / max(len(asked), 1)
        named = f"; not {', '.join(others)}" if others else ""
        lines.append(f"- {what}: {len(asked) - len(others)} of {len(asked)} ({share:.1%}){named}")
    for r in large:
        took = f"{r['seconds']:.0f} s and {r.get('trace_gib', r['peak_gib']):.1f} GiB"
        lines.append(f"- beyond {LARGE / 1e6:.0f} M parameters: {r['model']} took {took}")
    return lines


def _states(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which commits the records come from; what older ones did not look at."""
    states = Counter(r.get("source") or "before commits were noted" for r in records)
    older = sum("error" in r and "gradients" not in r for r in records)
    named = ", ".join(f"{count} x {name}" for name, count in states.most_common())
    lines = [f"Records by the commit they come from: {named}."]
    if older:
        lines.append(f"* {older} records compare no gradients by name: in them, backward means finite ones.")
    return lines


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
