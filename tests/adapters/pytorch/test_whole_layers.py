"""gsm-anneal on a real network whose blocks and kernels may go as a whole."""

from __future__ import annotations

import json
from pathlib import Path

from prunus.core.cli import run


def test_what_goes_is_what_held_out_images_lost_least_by_after_widths_were_searched_beside_it(
    tmp_path: Path,
) -> None:
    words = (
        "prune",
        "--plugin",
        "gsm-anneal",
        "--model",
        "prunus/resnet14_s2",
        "--data",
        "digits",
        "--threads",
        "1",
    )
    given = ("--set", "layers=blocks", "--set", "sensitivity=yes", "--set", "sweeps=1", "--target", "macs=30%")
    assert run([*words, *given, "--dense-epochs", "4", "--epochs", "0", "--output", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tried = [row["values"] for row in rows if row.get("note") == "layers"]
    assert len({values["blocks"] for values in tried}) > 1
    assert 0 in {values["blocks"] for values in tried}
    least = min(tried, key=lambda values: values["loss"])
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert len(plan["removed_blocks"]) == least["blocks"]
    widths = [row["values"] for row in rows if row.get("note") == "widths"]
    assert min(w["loss"] for w in widths) == least["loss"]
    assert sum(w["sweep"] == 0 for w in widths) == len(tried)  # every proposal has a search of its own
