"""Depth against width at equal MACs: what whole blocks and what channels save and cost.

    python benchmarks/depth.py latency [--model timm/NAME ...] [--threads 2] [--repeats 60]
    python benchmarks/depth.py accuracy --checkpoint DENSE.safetensors [...] [--target macs=60%] [--epochs 0]

`latency`: untrained models lose blocks (the least changing first) down to a target, and once more channels (the
same share of every group) down to exactly those MACs; `optimize latency` times both in turns with the original.
`accuracy`: ResNet-20 on Fashion-MNIST loses blocks, by either score, or channels by either plain way, to the
same MACs. One line of JSON for each run, Markdown at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = (
    "timm/resnet50",
    "timm/regnety_008",
    "timm/convnext_atto",
    "timm/mobilenetv3_large_100",
    "timm/deit_tiny_patch16_224",
)
CHANNELS = {"one-shot taylor": ("--plugin", "one-shot", "--importance", "taylor"), "gsm-anneal": ()}
UNTRAINED = (
    "--data",
    "digits",
    "--train-limit",
    "64",
    "--batch-size",
    "16",
    "--dense-epochs",
    "0",
    "--epochs",
    "0",
    "--set",
    "refit=none",
)


def optimize(*words: str) -> dict[str, Any]:
    """What a command prints with --json. Raises CalledProcessError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "prunus.core", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def latency(model: str, target: str, threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    """MACs and times of `model` without blocks, and without channels, as shares of the original's."""
    common = ("prune", "--model", model, *UNTRAINED, "--img-size", "224")
    deep = ("--plugin", "iterative", "--depth", "--set", "block_score=change", "--set", "images=8")
    short = optimize(*common, *deep, "--target", target, "--output", str(folder / "short"))
    same = f"macs={short['pruned']['macs']}"
    wide = ("--plugin", "one-shot", "--set", "scope=uniform")
    optimize(*common, *wide, "--target", same, "--output", str(folder / "narrow"))
    row: dict[str, Any] = {"model": model, "blocks": len(short["depth"]["removed"])}
    for kind in ("short", "narrow"):
        words = ("--threads", str(threads), "--repeats", str(repeats))
        found = optimize("latency", str(folder / kind), *words)
        row[kind] = {"macs": found["macs_share"], "time": found["ratio"], "quartiles": found["ratio_quartiles"]}
        row["dense_ms"] = 1e3 * found["dense"]["median"]
    return row


def accuracy(checkpoint: Path, target: str, epochs: float, folder: Path) -> dict[str, Any]:
    """Test accuracies of one dense model after each way of making it smaller."""
    common = ("prune", "--model", "prunus/resnet20", "--data", "fashion-mnist", "--checkpoint", str(checkpoint))
    common += ("--epochs", str(epochs), "--threads", "1")
    row: dict[str, Any] = {"checkpoint": checkpoint.stem, "target": target, "epochs": epochs}
    same = target
    for score in ("loss", "change"):
        for refit in ("sequential", "none"):
            words = (
                "--plugin",
                "iterative",
                "--depth",
                "--set",
                f"block_score={score}",
                "--set",
                f"refit={refit}",
            )
            run = optimize(*common, *words, "--target", target, "--output", str(folder / f"{score}-{refit}"))
            row["dense"] = run["dense"]["accuracy"]
            row[f"depth {score} {refit}"] = run["pruned"]["accuracy"]
            row[f"removed {score} {refit}"] = run["depth"]["removed"]
            same = f"macs={run['pruned']['macs']}"
    for name, words in CHANNELS.items():
        run = optimize(*common, *words, "--target", same, "--output", str(folder / name.replace(" ", "-")))
        row[f"width {name}"] = run["pruned"]["accuracy"]
        row["macs"] = run["pruned"]["macs"] / run["dense"]["macs"]
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("latency", "accuracy"))
    options.add_argument("--model", nargs="+", default=MODELS)
    options.add_argument("--checkpoint", nargs="+", type=Path, default=[])
    options.add_argument("--target", default="macs=60%")
    options.add_argument("--epochs", type=float, default=0.0)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=60)
    given = options.parse_args()
    rows = []
    for one in given.model if given.what == "latency" else given.checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            if given.what == "latency":
                row = latency(one, given.target, given.threads, given.repeats, Path(folder))
            else:
                row = accuracy(one, given.target, given.epochs, Path(folder))
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(_latency_table(rows) if given.what == "latency" else _accuracy_table(rows))


def _latency_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | dense | blocks removed | MACs left | time, fewer blocks | fewer channels | won per MAC |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        short, narrow = row["short"], row["narrow"]
        won = [(1 - x["time"]) / (1 - x["macs"]) for x in (short, narrow)]
        times = [f"{x['time']:.1%} ({x['quartiles'][0]:.1%} to {x['quartiles'][1]:.1%})" for x in (short, narrow)]
        head = f"| `{row['model']}` | {row['dense_ms']:.1f} ms | {row['blocks']} | {short['macs']:.1%} |"
        lines.append(f"{head} {times[0]} | {times[1]} | {won[0]:.2f} against {won[1]:.2f} |")
    return "\n".join(lines)


def _accuracy_table(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in rows[0] if key.startswith(("dense", "depth", "width"))]
    lines = ["| " + " | ".join(["checkpoint", "MACs", *keys]) + " |", "|---|" + "---:|" * (len(keys) + 1)]
    for row in rows:
        cells = [row["checkpoint"], f"{row['macs']:.1%}", *(f"{row[key]:.2%}" for key in keys)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
