"""Time of a channel graph, capture included: ours against torch-pruning's, model by model, on one thread.

    python benchmarks/tracing_time.py [NAME ...]

Each measurement runs in a process of its own, warmed up on a small network, three times; the rival is given a
minute. `labels and groups` is our time without the capture: a recording of the same program is labelled and
grouped again. Writes benchmarks/results/tracing_time.md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODELS = (
    "timm/resnet50",
    "timm/densenet121",
    "timm/densenet201",
    "timm/hrnet_w18",
    "timm/vit_base_patch16_224",
    "timm/rexnet_100",
    "timm/botnet26t_256",
    "torchvision/swin_t",
)
SECONDS, REPEATS = 60, 3
RESULTS = Path(__file__).with_name("results") / "tracing_time.md"


def ours(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds in all, and without the capture."""
    from prunus.adapters.pytorch.tracing import trace as tracing

    with stopwatch(tracing, "capture") as captures:
        start = time.perf_counter()
        trace = tracing.trace_model(model, args)
        total = time.perf_counter() - start
    return {"total": total, "groups alone": total - sum(captures), "groups": len(trace.graph.groups)}


def rival(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """torch-pruning's dependency graph, for which it captures a forward pass, and all of its groups."""
    import torch_pruning as tp

    with stopwatch(tp.DependencyGraph, "_trace") as captures:
        start = time.perf_counter()
        graph = tp.DependencyGraph().build_dependency(model, args[0])
        groups = list(graph.get_all_groups())
        total = time.perf_counter() - start
    return {"total": total, "groups alone": total - sum(captures), "groups": len(groups)}


@contextmanager
def stopwatch(place: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of `place.name` inside the block."""
    seconds: list[float] = []
    original = getattr(place, name)

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*given, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(place, name, timed)
    try:
        yield seconds
    finally:
        setattr(place, name, original)


def measure(who: str, name: str) -> None:
    """One measurement, as JSON on stdout."""
    import torch
    from torch import nn

    from prunus.adapters.pytorch.catalog import build

    torch.set_num_threads(1)
    run = {"ours": ours, "rival": rival}[who]
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    run(small, (torch.zeros(1, 3, 8, 8),))
    built = build(name)
    print(json.dumps(run(built.module, built.input.example(1))))


def measured(who: str, name: str) -> dict[str, Any]:
    """Medians of several measurements, or what went wrong."""
    found: list[dict[str, float]] = []
    for _ in range(REPEATS):
        command = [sys.executable, __file__, "--measure", who, name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            # loading the model counts for nobody, and takes up to a minute on a busy machine
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, env=environment)
        except subprocess.TimeoutExpired:
            return {"fault": f"over {SECONDS} s"}
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"fault": last[:80].replace("|", "/")}
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    return {"fault": f"over {SECONDS} s"} if medians["total"] > SECONDS else medians


def table(rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    import torch
    import torch_pruning as tp

    lines = [
        "# Time of a channel graph",
        "",
        f"Medians of {REPEATS} processes, one thread, on a {platform.machine()} machine of "
        f"{os.cpu_count()} cores; torch {torch.__version__}, torch-pruning {tp.__version__}.",
        "Seconds in all: from the model to the groups, capture included. Groups alone: without the recording of",
        "the forward pass (`capture` of ours, `DependencyGraph._trace` of torch-pruning's).",
        f"torch-pruning is given {SECONDS} s. Written by `python benchmarks/tracing_time.py`.",
        "",
        "| model | prunus, in all | torch-pruning, in all | prunus, groups alone | torch-pruning, groups alone "
        "| groups |",
        "|---|---|---|---|---|---|",
    ]
    for name, (mine, theirs) in rows.items():
        cells = [name]
        for key in ("total", "groups alone"):
            cells += [f"{one[key]:.2f}" if key in one else one["fault"] for one in (mine, theirs)]
        counts = [f"{one['groups']:.0f}" if "groups" in one else "-" for one in (mine, theirs)]
        lines.append("| " + " | ".join([*cells, " / ".join(counts)]) + " |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    rows = {}
    for name in names or MODELS:
        rows[name] = measured("ours", name), measured("rival", name)
        print(name, *rows[name], flush=True)
    RESULTS.write_text(table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4])
    else:
        main(sys.argv[1:])
