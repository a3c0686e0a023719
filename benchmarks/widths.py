"""Do widths matter where a network is trained from scratch, and depth? One of prunus' ResNets, at equal compute.

    python -m benchmarks.widths --share 0.5 --compute 23 --seeds 0 1 2
    python -m benchmarks.widths --share 0.25 --compute 20.4 --tilts even --fewer-blocks 0 0.75

Every tilt is a family of networks with one number, which is chosen so that the MACs are `--share` of the whole
network's; a share of the blocks may be gone, as in joint-search (`spread_blocks`). Each is trained from the same
random weights, cut to size, for as many epochs as come to `--compute` epochs of the whole network in MACs, and
judged by the training images that the protocol leaves out (left_out.py). Rows go to --output as they are found;
what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.left_out import judge_by_left_out
from benchmarks.rivals.narrow import fan_outs, rescale
from prunus.adapters.pytorch.session import open_session
from prunus.core.compare_protocol import Protocol, read_protocol
from prunus.core.directives import Remove, Train
from prunus.core.graph import ChannelGraph
from prunus.core.settings import make_settings
from prunus.plugins.depth import spread_blocks

HERE = Path(__file__).parent

TILTS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "even": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "wide early": ((1.4, 1.0, 0.75), (1.4, 1.0, 0.75)),
    "wide late": ((0.6, 1.0, 1.4), (0.6, 1.0, 1.4)),
    "wide streams": ((1.4, 1.4, 1.4), (0.75, 0.75, 0.75)),
    "wide blocks": ((0.7, 0.7, 0.7), (1.3, 1.3, 1.3)),
    "wide early blocks": ((1.2, 1.1, 0.9), (1.5, 0.9, 0.6)),
}
"""Relative widths of the residual streams of the three stages, and of the layers inside their blocks."""


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    protocol = read_protocol(options.protocol)
    done = _rows(options.output)
    for seed in options.seeds:
        for tilt, fewer in itertools.product(options.tilts, options.fewer_blocks):
            place = {"share": options.share, "compute": options.compute, "seed": seed, "tilt": tilt}
            place |= {"fewer_blocks": fewer}
            if not any(place.items() <= row.items() for row in done):
                row = {**place, **_trained(protocol, seed, tilt, fewer, options.share, options.compute)}
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(_table(_rows(options.output)))


def _trained(
    protocol: Protocol, seed: int, tilt: str, fewer: float, share: float, compute: float
) -> dict[str, Any]:
    dense = protocol.dense_settings(seed)
    session = open_session(make_settings({**dense.model_dump(exclude_unset=True), "dense_epochs": None}))
    judge_by_left_out(session)
    adapter, whole = session.adapter, session.graph.cost().macs
    adapter.remove(Remove(keep={}, blocks=spread_blocks(session.graph, fewer)))
    widths = _widths(adapter.graph, tilt, share * whole)
    outputs = fan_outs(adapter.model)
    adapter.remove(Remove(keep={name: np.arange(width) for name, width in widths.items()}))
    rescale(adapter.model, outputs)
    macs = adapter.graph.cost().macs
    adapter.train(Train(epochs=compute * whole / macs, label="narrow"))
    judged = adapter.test()
    return {
        "widths": list(widths.values()),
        "macs": macs / whole,
        "params": adapter.graph.cost().params,
        "accuracy": judged.accuracy,
        "loss": judged.loss,
    }


def _widths(graph: ChannelGraph, tilt: str, limit: float) -> dict[str, int]:
    """group -> units, the widest of that tilt within `limit` MACs; no group wider than it was."""
    factors = {name: _factor(name, tilt) for name in graph.prunable}

    def at(scale: float) -> dict[str, int]:
        units = {name: group.units for name, group in graph.prunable.items()}
        return {
            n: max(graph.groups[n].min_units, round(u * min(1.0, scale * factors[n]))) for n, u in units.items()
        }

    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if graph.cost(at(middle)).macs <= limit else (low, middle)
    return at(low)


def _factor(group: str, tilt: str) -> float:
    """By the names of prunus' ResNets: a stream is written by the stem and the second layers of blocks."""
    streams, blocks = TILTS[tilt]
    stage = 0 if group.startswith("stem") else int(group.split(".")[1])
    return blocks[stage] if ".first." in group else streams[stage]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| share, compute | tilt | blocks gone | widths | parameters | accuracy in %, mean, every seed | loss |",
        "|---" * 7 + "|",
    ]
    keys = ("share", "compute", "tilt", "fewer_blocks")
    for place in {tuple(row[key] for key in keys): None for row in rows}:
        share, compute, tilt, fewer = place
        mine = [row for row in rows if tuple(row[key] for key in keys) == place]
        mine.sort(key=lambda row: row["seed"])
        each = " ".join(f"{100 * row['accuracy']:.2f} (seed {row['seed']})" for row in mine)
        mean, loss = 100 * fmean(row["accuracy"] for row in mine), fmean(row["loss"] for row in mine)
        widths = " ".join(map(str, mine[0]["widths"]))
        which = f"{share:g}, {compute:g} | {tilt} | {fewer:g} | {widths} | {mine[0]['params']:,.0f}"
        lines.append(f"| {which} | {mean:.2f}: {each} | {loss:.4f} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocols" / "fashion_fast.toml")
    parser.add_argument("--share", type=float, default=0.5, help="of the whole network's MACs")
    parser.add_argument("--compute", type=float, default=23.0, help="training, in epochs of the whole network")
    parser.add_argument("--tilts", nargs="+", choices=list(TILTS), default=list(TILTS))
    parser.add_argument("--fewer-blocks", nargs="+", type=float, default=[0.0], help="shares that are gone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "widths.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
