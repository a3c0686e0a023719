"""Time of a channel graph, capture included: ours against torch-pruning's, model by model, on one thread.

    python benchmarks/tracing_time.py [NAME ...]

Each measurement runs in a process of its own, warmed up on a small network; ours and theirs take turns, three
times. Time is that of the processor, which other processes on the machine lengthen little; either side is given
a minute of it. Writes benchmarks/results/tracing_time.md; models that are not named keep their rows.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
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
LOADING = 30
"""Seconds for imports and for building the model, which count for nobody."""
RESULTS = Path(__file__).with_name("results") / "tracing_time.md"
RECORDS = RESULTS.with_suffix(".json")


def ours(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds in all, and those of labels and groups: capture, costs and residual blocks come on top."""
    from prunus.adapters.pytorch.tracing import trace as tracing
    from prunus.adapters.pytorch.tracing.grouping import Grouping
    from prunus.adapters.pytorch.tracing.labelling import Labelling

    with stopwatch(Labelling, "run") as labels, stopwatch(Grouping, "__init__") as groups:
        start = time.process_time()
        trace = tracing.trace_model(model, args)
        total = time.process_time() - start
    return {"total": total, "groups alone": sum(labels) + sum(groups), "groups": len(trace.graph.groups)}


def certification(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of ours to try the graph out on copies of the model, after tracing."""
    from prunus.adapters.pytorch.certification import certify
    from prunus.adapters.pytorch.verification import prepare

    prepared = prepare(model, args, certified=False)
    start = time.process_time()
    certify(model, prepared.trace, prepared.bindings, args)
    return {"certification": time.process_time() - start}


def rival(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """torch-pruning's dependency graph, for which it runs a forward pass, and all of its groups."""
    import torch_pruning as tp

    with stopwatch(model, "forward") as captures:
        start = time.process_time()
        graph = tp.DependencyGraph().build_dependency(model, args[0])
        groups = list(graph.get_all_groups())
        total = time.process_time() - start
    return {"total": total, "groups alone": total - sum(captures), "groups": len(groups)}


@contextmanager
def stopwatch(place: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of `place.name` inside the block."""
    seconds: list[float] = []
    original = getattr(place, name)

    def timed(*given: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return original(*given, **named)
        finally:
            seconds.append(time.process_time() - start)

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
    run = {"ours": ours, "rival": rival, "certification": certification}[who]
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    run(small, (torch.zeros(1, 3, 8, 8),))
    built = build(name)
    print(json.dumps(run(built.module, built.input.example(1))))


def measured(who: str, name: str) -> dict[str, Any]:
    """One measurement in a process of its own, or what went wrong with it."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", who, name],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=_limit,
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"fault": f"over {SECONDS} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"fault": last[:80].replace("|", "/")}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"fault": f"over {SECONDS} s"} if found.get("total", 0) > SECONDS else found


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + LOADING, SECONDS + LOADING + 5))


def compared(name: str) -> dict[str, dict[str, Any]]:
    """Medians by who was measured; whoever fails is not asked again."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "rival": []}
    for _ in range(REPEATS):
        for who, measurements in found.items():
            if not any("fault" in one for one in measurements):
                measurements.append(measured(who, name))
    medians = {who: _median(measurements) for who, measurements in found.items()}
    return {**medians, "certification": measured("certification", name)}


def _median(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    fault = next((one for one in measurements if "fault" in one), None)
    return fault or {key: statistics.median(one[key] for one in measurements) for key in measurements[0]}


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    import torch
    import torch_pruning as tp

    lines = [
        "# Time of a channel graph",
        "",
        f"Medians of {REPEATS} processes in turn, one thread, seconds of the processor, on a {platform.machine()} "
        f"machine of {os.cpu_count()} cores; torch {torch.__version__}, torch-pruning {tp.__version__}.",
        "In all: from the model to the groups, capture included; ours with exact costs and residual blocks.",
        "Groups alone: labels and groups of ours, all but the model's call of torch-pruning's.",
        "Certification: ours, on top; random removals are tried on copies of the model.",
        f"Either is given {SECONDS} s. Written by `python benchmarks/tracing_time.py`.",
        "",
        "| model | prunus, in all | torch-pruning, in all | prunus, groups alone | torch-pruning, groups alone "
        "| groups | certification |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        both = [row["ours"], row["rival"]]
        cells = [name]
        for key in ("total", "groups alone"):
            cells += [_cell(one, key) for one in both]
        counts = [f"{one['groups']:.0f}" if "groups" in one else "-" for one in both]
        cells += [" / ".join(counts), _cell(row["certification"], "certification")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any], key: str) -> str:
    return f"{one[key]:.2f}" if key in one else str(one["fault"])


def main(names: list[str]) -> None:
    for name in names or MODELS:
        rows = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        rows[name] = compared(name)
        print(name, rows[name], flush=True)
        RECORDS.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.write_text(table({n: rows[n] for n in (*MODELS, *rows) if n in rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4])
    else:
        main(sys.argv[1:])
