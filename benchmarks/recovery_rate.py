"""Which peak learning rate a recovery wants, by what was lost before it and by how long it lasts.

    python -m benchmarks.recovery_rate --targets macs=50% macs=25% macs=10% --epochs 1.5 6 --rates .02 .03 .05 .075

For every target and seed one search, and from the network that it leaves one recovery for each length and rate.
They are judged by the training images that the protocol leaves out (left_out.py), so tests stay untouched. Rows go
to --output as they are found; what is there is not run again. Dense networks are `optimize compare`'s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.left_out import judge_by_left_out
from prunus.adapters.pytorch.session import open_session
from prunus.core.compare_cell import train_dense
from prunus.core.compare_protocol import Protocol, read_protocol
from prunus.core.compare_record import ResultsFolder
from prunus.core.directives import Evaluate, Train
from prunus.core.pruning import find_method, make_preamble, make_task
from prunus.core.registry import Registry
from prunus.core.run import conduct
from prunus.core.settings import RunSettings

HERE = Path(__file__).parent


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    protocol, registry = read_protocol(options.protocol), Registry.discover()
    results = ResultsFolder(options.results)
    done = _rows(options.output)
    for seed in options.seeds:
        train_dense(protocol, seed, results, registry)
        checkpoint = results.dense_folder(protocol.dense_key(seed)) / "model.safetensors"
        for target in options.targets:
            place = {"method": options.method, "target": target, "seed": seed}
            wanted = [(epochs, rate) for epochs in options.epochs for rate in options.rates]
            missing = [w for w in wanted if not any(_is(row, place, *w) for row in done)]
            if missing:
                settings = _settings(protocol, options.method, target, seed, checkpoint)
                for row in _recoveries(settings, registry, missing):
                    with options.output.open("a") as file:
                        file.write(json.dumps({**place, **row}) + "\n")
    print(_table(_rows(options.output)))


def _settings(protocol: Protocol, method: str, target: str, seed: int, checkpoint: Path) -> RunSettings:
    for cell in protocol.cells:
        place = (cell.entry.name, cell.target, cell.seed, cell.teaching)
        if place == (method, target, seed, "plain") and cell.epochs > 0:
            return protocol.settings(cell, checkpoint)
    raise SystemExit(f"the protocol has no cell of {method} at {target} with seed {seed} that trains")


def _recoveries(
    settings: RunSettings, registry: Registry, wanted: list[tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    method = find_method(settings, registry)
    session = open_session(method.resolved(settings))
    settings, adapter = session.settings, session.adapter
    judge_by_left_out(session)
    task = make_task(settings, method, session, session.graph.cost())
    preamble = make_preamble(settings, method, session)
    steps = conduct(method.policy, task, adapter, plugin=settings.plugin, events=_Unheard(), preamble=preamble)
    recovery = next(steps)
    while recovery.label != "recover":
        recovery = steps.send(adapter.train(recovery))
    with tempfile.TemporaryDirectory() as folder:
        adapter.checkpoint(Path(folder))
        start = {"start": adapter.test().accuracy, "start_held_out": adapter.evaluate(Evaluate()).accuracy}
        for epochs, rate in wanted:
            adapter.train(Train(epochs=epochs, lr=rate, distil=recovery.distil, label="recover"))
            judged = adapter.test()
            yield {**start, "epochs": epochs, "rate": rate, "accuracy": judged.accuracy, "loss": judged.loss}
            adapter.restore(Path(folder))
    steps.close()


class _Unheard:
    """Events of a run that nobody follows."""

    def began(self, *told: Any) -> None: ...

    def carried_out(self, *told: Any) -> None: ...

    def answered(self, *told: Any) -> None: ...

    def progress(self, *told: Any) -> None: ...

    def notice(self, text: str) -> None: ...


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _is(row: dict[str, Any], place: dict[str, Any], epochs: float, rate: float) -> bool:
    return {**row, **place, "epochs": epochs, "rate": rate} == row


def _table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in %, mean and every seed: a line for each target and length, a column for each rate."""
    rates = sorted({row["rate"] for row in rows})
    lines = [f"| method, target, epochs | before | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---" * (len(rates) + 2) + "|")
    places = {(row["method"], row["target"], row["epochs"]): None for row in rows}
    for method, target, epochs in places:
        mine = [row for row in rows if (row["method"], row["target"], row["epochs"]) == (method, target, epochs)]
        of_seed = {row["seed"]: row["start"] for row in mine}
        cells = [_cell(list(of_seed.values()))]
        cells += [_cell([row["accuracy"] for row in mine if row["rate"] == rate]) for rate in rates]
        lines.append(f"| {method}, {target}, {epochs:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    each = " ".join(f"{100 * value:.2f}" for value in values)
    return f"{100 * fmean(values):.2f} ({each})" if values else "·"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocols" / "fashion_fast.toml")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "fashion_fast")
    parser.add_argument("--method", default="gsm-anneal", help="an entry of the protocol")
    parser.add_argument("--targets", nargs="+", default=["macs=50%", "macs=25%", "macs=10%"])
    parser.add_argument("--epochs", nargs="+", type=float, default=[1.5, 6])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.03, 0.05, 0.075])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "recovery_rate.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
