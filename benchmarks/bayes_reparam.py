"""Figures of bayes-reparam without training: accuracy right after pruning, and how well it foretells.

    python benchmarks/bayes_reparam.py --checkpoint dense/seed{seed}.safetensors --seeds 0 1 2 \
        --targets macs=75% macs=50% macs=25% --output bayes_reparam.jsonl

One JSON line per run: seed, target, variant, held-out and test accuracy, MACs, prediction notes. Runs that
the output holds already are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.adapters.pytorch.session import open_session
from prunus.core.budget import Budget, Target
from prunus.core.directives import Directive, Evaluate, Note, Observation
from prunus.core.importance import ImportanceEstimator
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.run import Preamble, execute
from prunus.core.settings import RunSettings
from prunus.plugins.bayes_reparam import BayesReparam, BayesReparamConfig
from prunus.plugins.magnitude import Magnitude
from prunus.plugins.one_shot import OneShot, OneShotConfig
from prunus.plugins.taylor import Taylor


@dataclass
class Notes:
    """Collects a run's notes; implements `core.run.Events`."""

    kept: list[Note] = field(default_factory=list)

    def began(self, index: int, directive: Directive) -> None: ...

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None: ...

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None:
        if isinstance(directive, Note):
            self.kept.append(directive)

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None: ...

    def notice(self, text: str) -> None: ...


def variants() -> dict[str, tuple[PruningPolicy, ImportanceEstimator | None]]:
    """Name -> method. Those of `bayes` with sensitivity off and one round choose the same channels; nothing is
    tried where the search ends, which is measured by the comparison (benchmarks/README.md)."""

    def bayes(**config: Any) -> tuple[PruningPolicy, None]:
        return BayesReparam(BayesReparamConfig(sweeps=0, **config)), None

    def ranked(estimator: ImportanceEstimator, **config: Any) -> tuple[PruningPolicy, ImportanceEstimator]:
        return OneShot(OneShotConfig(**config)), estimator

    return {
        "bayes none": bayes(refit="none", rounds=1, recalibrate="no", sensitivity="no"),
        "bayes none+rc": bayes(refit="none", rounds=1, recalibrate="yes", sensitivity="no"),
        "bayes bias": bayes(refit="bias", rounds=1, recalibrate="no", sensitivity="no"),
        "bayes least-squares": bayes(refit="least-squares", rounds=1, recalibrate="no", sensitivity="no"),
        "bayes least-squares+rc": bayes(refit="least-squares", rounds=1, recalibrate="yes", sensitivity="no"),
        "bayes sequential": bayes(refit="sequential", rounds=1, recalibrate="no", sensitivity="no"),
        "bayes": bayes(rounds=1),
        "bayes, no sensitivity": bayes(rounds=1, sensitivity="no"),
        "magnitude none+rc": ranked(Magnitude(), refit="none", recalibrate="yes"),
        "magnitude sequential": ranked(Magnitude(), refit="sequential", recalibrate="if-better"),
        "taylor none+rc": ranked(Taylor(), refit="none", recalibrate="yes"),
        "taylor sequential": ranked(Taylor(), refit="sequential", recalibrate="if-better"),
        "bayes 4 rounds": bayes(rounds=4),
        "bayes 4 rounds, no survival": bayes(rounds=4, survival=False),
        "bayes 4 rounds, no memory": bayes(rounds=4, memory="none"),
    }


def main() -> None:
    options = _arguments()
    done = {(r["seed"], r["target"], r["variant"]) for r in _lines(options.output)}
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for target in options.targets:
            for name, (policy, estimator) in variants().items():
                wanted = not options.variants or name in options.variants
                if wanted and (seed, target, name) not in done:
                    result = _run(options, seed, target, policy, estimator)
                    row = {"model": options.model, "seed": seed, "target": target, "variant": name, **result}
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps({k: v for k, v in row.items() if k != "prediction"}), flush=True)


def _run(
    options: argparse.Namespace,
    seed: int,
    target: str,
    policy: PruningPolicy,
    estimator: ImportanceEstimator | None,
) -> dict[str, Any]:
    session = open_session(
        RunSettings(
            model=options.model,
            data=options.data,
            checkpoint=Path(options.checkpoint.format(seed=seed)),
            train_limit=options.train_limit,
            lr=options.lr,
            epochs=options.epochs,
            channels_last=options.epochs > 0,
            amp=options.epochs > 0,
            threads=options.threads,
            seed=seed,
        )
    )
    before = session.test()
    assert before is not None
    budget = Budget.resolve([Target.parse(target)], session.graph.cost())
    task = PruningTask(
        session.graph,
        budget,
        np.random.default_rng(seed),
        estimator,
        epochs=options.epochs,
        has_data=True,
        has_labels=True,
        classes=session.classes,
    )
    notes, began = Notes(), time.perf_counter()
    execute(policy, task, session.adapter, plugin="benchmark", events=notes, preamble=Preamble())
    seconds = time.perf_counter() - began
    after = session.test()
    assert after is not None
    return {
        "dense": before.accuracy,
        "test": after.accuracy,
        "holdout": session.adapter.evaluate(Evaluate()).accuracy,
        "load": budget.load(session.adapter.graph.cost()),
        "seconds": round(seconds, 1),
        "prediction": [dict(n.values) for n in notes.kept if n.kind == "prediction"],
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="prunus/resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--checkpoint", required=True, help="dense weights; {seed} is replaced")
    parser.add_argument("--train-limit", type=int, default=16000)
    parser.add_argument("--targets", nargs="+", default=["macs=75%", "macs=50%", "macs=25%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
