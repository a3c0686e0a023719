"""Scripts of benchmarks/ are imported from the top of the repository, as `python -m` does there."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
