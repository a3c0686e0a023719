"""What expansion before pruning is worth: branches and wide against none, with the same compute for all.

    python benchmarks/expansion.py --output benchmarks/results/expansion.jsonl
        [--models prunus/resnet20 prunus/vgg11_bn_small] [--targets macs=25% params=20%] [--seeds 0 1 2]
        [--variants none branches] [--dense-epochs 10] [--compute 5]

Fashion-MNIST (16,000 training images, a tenth of them held out). Every seed of a model has one dense network,
trained for `--dense-epochs`; from there on every variant has the compute of `--compute` epochs of the dense
network: rounds in the expanded one, whatever it costs, and what is left of it recovers the pruned one, whatever
its MACs turn out to be (`equal_compute`). One JSON line a run: accuracy held out and on test, MACs, parameters,
training MACs, and what went; what the output holds already is skipped. `--table` prints the Markdown table of a
file and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunus.adapters.pytorch.session import open_session
from prunus.core.directives import Evaluate, Train
from prunus.core.plan import PruningPlan
from prunus.core.pruning import Silent, prune
from prunus.core.registry import Registry
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings, make_settings

MODELS = ("prunus/resnet20", "prunus/vgg11_bn_small")
TARGETS = ("macs=25%", "macs=10%", "params=20%", "params=10%")
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "at once": {"rounds": 1},
    "wide": {"expansion": "wide", "rounds": 2, "round_share": 0.4, "round_lr": 0.05},
    "branches": {"expansion": "branches", "round_share": 0.4, "round_lr": 0.05},
    "branches, channels alone": {"expansion": "branches", "round_share": 0.4, "round_lr": 0.05, "layers": "none"},
    "layers": {"layers": "all"},
    "kernels": {"layers": "kernels"},
    "blocks": {"layers": "blocks"},
}


def settings_of(model: str, seed: int, **values: Any) -> RunSettings:
    fixed = {"data": "fashion-mnist", "train_limit": 16000, "batch_size": 128, "threads": 1}
    return make_settings({**fixed, "model": model, "seed": seed, "amp": True, "channels_last": True, **values})


def dense(model: str, seed: int, epochs: float, lr: float, folder: Path) -> Path:
    """Weights of the dense network of that seed: from their file, or trained now."""
    place = folder / f"{model.replace('/', '_')}_{epochs:g}_seed{seed}"
    if not (place / "model.safetensors").exists():
        session = open_session(settings_of(model, seed, lr=lr))
        session.adapter.train(Train(epochs=epochs, label="dense"))
        place.mkdir(parents=True, exist_ok=True)
        session.save(place, PruningPlan(model=session.source), {})
    return place / "model.safetensors"


def run(model: str, target: str, seed: int, variant: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The record of one run."""
    checkpoint = dense(model, seed, chosen.dense_epochs, chosen.dense_lr, chosen.dense)
    config = {**VARIANTS[variant], "distil": "never", "compute": chosen.compute, **json.loads(chosen.set)}
    values = {
        "plugin": "equal_compute:EqualCompute",
        "targets": (target,),
        "config": config,
        "checkpoint": checkpoint,
        "lr": 0.05,
    }
    options = settings_of(model, seed, epochs=chosen.compute, **values)
    opened: list[Any] = []

    def opening(resolved: RunSettings) -> Any:
        opened.append(open_session(resolved))
        return opened[0]

    started = time.process_time()
    place = RunFolder(chosen.dense / "work")
    report = prune(
        options, place, Registry.discover(), Silent(), resume=False, overwrite=True, open_session=opening
    )
    adapter = opened[0].adapter
    epoch = 3 * report.dense.macs * report.images["train"]
    return {
        "model": model, "target": target, "seed": seed, "variant": variant, "set": chosen.set,
        "compute": round(report.training_macs / epoch, 3), "asked": chosen.compute,
        "dense_epochs": chosen.dense_epochs,
        "dense": report.dense.accuracy, "test": report.pruned.accuracy,
        "holdout": adapter.evaluate(Evaluate()).accuracy,
        "macs": report.pruned.macs / report.dense.macs, "params": report.pruned.params / report.dense.params,
        "blocks": report.depth.removed, "kernels": adapter.plan.reduced(adapter.original_graph),
        "widths": {row.name: [row.units, row.kept] for row in report.widths},
        "error": report.verification.max_error / max(report.verification.scale, 1e-30),
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: mean on test and every seed, compute in epochs of the dense network, what went."""
    cells: dict[tuple[str, str, float], dict[str, list[dict[str, Any]]]] = {}
    for r in records:
        row = f"`{r['model']}`, {r['dense_epochs']:g} epochs dense"
        cells.setdefault((row, r["target"], r["asked"]), {}).setdefault(r["variant"], []).append(r)
    yield "| model, target | expansion | test | MACs, parameters left | compute | blocks, kernels gone |"
    yield "|---|---|---:|---:|---:|---:|"
    for (model, target, _), variants in cells.items():
        for variant, rows in variants.items():
            rows.sort(key=lambda r: r["seed"])
            seeds = " ".join(f"{100 * r['test']:.2f}" for r in rows)
            test = f"{100 * statistics.mean(r['test'] for r in rows):.2f} ({seeds})"
            left = ", ".join(f"{statistics.mean(r[key] for r in rows):.1%}" for key in ("macs", "params"))
            spent = statistics.mean(r["compute"] for r in rows)
            gone = " / ".join(f"{len(r['blocks'])}, {len(r['kernels'])}" for r in rows)
            yield f"| {model}, {target} | {variant} | {test} | {left} | {spent:.2f} | {gone} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["none", "wide", "branches"], choices=list(VARIANTS))
    parser.add_argument("--dense-epochs", type=float, default=10)
    parser.add_argument("--dense-lr", type=float, default=0.15)
    parser.add_argument("--compute", type=float, default=5, help="epochs of the dense network after its training")
    parser.add_argument("--set", default="{}", help="further settings of the method, JSON")
    parser.add_argument("--dense", type=Path, default=Path("dense"), help="folder of the dense networks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    lines = chosen.output.read_text("utf-8").splitlines() if chosen.output.exists() else []
    records = [json.loads(line) for line in lines]
    if chosen.table:
        print("\n".join(table(records)))
        return
    key = ("model", "target", "seed", "variant", "set", "asked", "dense_epochs")
    done = {tuple(record[k] for k in key) for record in records}
    fixed = (chosen.set, chosen.compute, chosen.dense_epochs)
    for seed in chosen.seeds:
        for model in chosen.models:
            for target in chosen.targets:
                for variant in chosen.variants:
                    if (model, target, seed, variant, *fixed) in done:
                        continue
                    record = run(model, target, seed, variant, chosen)
                    with chosen.output.open("a", encoding="utf-8") as output:
                        output.write(json.dumps(record) + "\n")
                    print(model, target, seed, variant, record["test"], record["compute"], flush=True)


if __name__ == "__main__":
    main()
