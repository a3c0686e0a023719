"""gsm-anneal must not collapse: smallest kept share, final entropy and cost at 10% of the MACs, seed by seed.

    python benchmarks/collapse.py [--seeds 10] [--model prunus/resnet20] [--target macs=10%] [--dense-epochs 8]

Each seed trains its own dense model on the digits, then prunes it without any training after. Prints one line
per seed and exits with 1 if a group fell under its floor, the entropy is above 2% of log 2, or the target is
missed (the guards of the method raise before that).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from prunus.adapters.pytorch import prune


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--model", default="prunus/resnet20")
    options.add_argument("--target", default="macs=10%")
    options.add_argument("--dense-epochs", type=float, default=8)
    given = options.parse_args()
    bad = 0
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            pruned = prune(
                given.model,
                data="digits",
                target=given.target,
                dense_epochs=given.dense_epochs,
                epochs=0.0,
                lr=0.1,
                seed=seed,
                threads=1,
                output=run,
            )
            notes = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        entropy = [n["values"]["entropy"] for n in notes if n.get("note") == "anneal"][-1]
        report = pruned.report
        # the classifier's group is locked and stays whole
        shares = [g.kept / g.units for g in report.widths if g.locked is None]
        kept = min(shares)
        ok = report.target_met and kept >= 0.05 and entropy < 0.02
        bad += not ok
        accuracy = (report.dense.accuracy or 0.0, report.pruned.accuracy or 0.0)
        print(
            f"seed {seed}: dense {accuracy[0]:.2%}, pruned {accuracy[1]:.2%}, smallest kept share {kept:.1%}, "
            f"entropy {entropy:.4f}, MACs {report.pruned.macs / report.dense.macs:.2%}{'' if ok else '  BAD'}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
