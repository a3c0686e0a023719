"""Peak host memory of pruning large models: whole runs, each in a fresh process.

    python benchmarks/memory.py --models timm/resnet50 timm/vit_base_patch16_224 \
        --plugins gsm-anneal bayes-reparam --output memory.jsonl

Batch 16 at 224 x 224 from random weights on images of noise: a few training steps with gates on, the method's
signals, the removal with its verification and refit, the artifact. Only the refit needs more memory for more
images, up to its budget: `--plugins one-shot --epochs 0 --images 512` fills that. One JSON line per run: the peak
(ru_maxrss of the process, with everything it has imported), after which directives it had risen, and the processor
seconds of each kind of directive and of the method's own thinking. What the output holds already is skipped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

GIB = 2**20  # ru_maxrss counts KiB
CONFIGS = {"gsm-anneal": {"rounds": 2}}
"""A round that trains with gates before the last one."""


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


def run(
    model_name: str, plugin: str, settings: dict[str, Any], config: dict[str, Any], images: int
) -> dict[str, Any]:
    """The record of one run, made in this process. `config`: of the method; empty: that of `CONFIGS`."""
    import torch
    from torch.utils.data import Dataset

    from prunus.adapters.pytorch.catalog import build, construct
    from prunus.adapters.pytorch.defaults import filled
    from prunus.adapters.pytorch.session import PyTorchSession
    from prunus.adapters.pytorch.user_data import bundle_of
    from prunus.core.pruning import Silent, prune
    from prunus.core.registry import Registry
    from prunus.core.run_folder import RunFolder
    from prunus.core.settings import make_settings

    class Noise(Dataset[tuple[torch.Tensor, int]]):
        """Made when they are read, as a folder's images are."""

        targets = tuple(i % 8 for i in range(images))

        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.randn(3, 224, 224), self.targets[index]

    class Peaks(Silent):
        def __init__(self) -> None:
            self.rises: list[tuple[str, float, float]] = []
            self.seconds: dict[str, float] = {}
            self._mark = time.process_time()

        def spent(self, what: str) -> None:
            now = time.process_time()
            self.seconds[what] = self.seconds.get(what, 0.0) + now - self._mark
            self._mark = now

        def began(self, index: int, directive: Any) -> None:
            self.spent("method")

        def answered(self, index: int, directive: Any, observation: Any) -> None:
            gates = " with gates" if getattr(directive, "gates", None) is not None else ""
            kind = type(directive).__name__ + gates
            self.spent(kind)
            self.rise(f"{index} {kind}")

        def rise(self, what: str) -> None:
            if not self.rises or peak() > self.rises[-1][1] + 0.01:
                self.rises.append((what, round(peak(), 2), round(time.monotonic() - started, 1)))
                print(*self.rises[-1], file=sys.stderr, flush=True)

    started, peaks = time.monotonic(), Peaks()  # of the clock; the seconds of a directive are the processor's
    torch.manual_seed(0)
    peaks.rise("imports")
    built = build(model_name, seed=0)
    data = Noise()
    peaks.rise("model")
    wanted = {
        "model": model_name,
        "plugin": plugin,
        "targets": ("macs=50%",),
        "data": "given",
        "config": config or CONFIGS.get(plugin, {}),
    }
    options = make_settings({**wanted, **settings})

    def opened(resolved: Any) -> Any:
        bundle = bundle_of(data, None, holdout=resolved.holdout, batch_size=resolved.batch_size)
        trained = replace(built, has_weights=True)
        session = PyTorchSession(filled(resolved), trained, bundle, lambda source: construct(source))
        peaks.spent("tracing")
        peaks.rise("traced")
        return session

    with tempfile.TemporaryDirectory() as folder:
        report = prune(
            options, RunFolder(Path(folder) / "run"), Registry.discover(), peaks, resume=False, overwrite=False,
            open_session=opened,
        )  # fmt: skip
    return {
        "model": model_name, "plugin": plugin, "batch": options.batch_size, "accumulate": options.accumulate,
        "images": images, "config": config,
        "peak_gib": round(peak(), 2), "rises": peaks.rises,
        "processor_seconds": {kind: round(spent, 1) for kind, spent in peaks.seconds.items()},
        "total_seconds": round(time.monotonic() - started, 1),
        "macs": report.pruned.macs / report.dense.macs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["timm/resnet50", "timm/vit_base_patch16_224"])
    parser.add_argument("--plugins", nargs="+", default=["gsm-anneal", "bayes-reparam"])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="instead of two rounds")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--one", action="store_true", help="run the first pair here and print its record")
    chosen = parser.parse_args()
    settings = {"batch_size": chosen.batch, "epochs": chosen.epochs, "threads": chosen.threads, "lr": 1e-3}
    settings["accumulate"] = chosen.accumulate
    if chosen.one:
        config = dict(pair.split("=", 1) for pair in chosen.set)
        print(json.dumps(run(chosen.models[0], chosen.plugins[0], settings, config, chosen.images)))
        return
    lines = chosen.output.read_text("utf-8").splitlines() if chosen.output.exists() else []
    done = {(record["model"], record["plugin"]) for record in map(json.loads, lines)}
    for model in chosen.models:
        for plugin in chosen.plugins:
            if (model, plugin) in done:
                continue
            words = [sys.executable, __file__, *sys.argv[1:], "--one", "--models", model, "--plugins", plugin]
            record = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            with chosen.output.open("a", encoding="utf-8") as output:
                output.write(record)


if __name__ == "__main__":
    main()
