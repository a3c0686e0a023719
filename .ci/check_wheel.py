"""Look into a built wheel: what must be in it, and what must not."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

FOLDERS = ("core", "plugins", "adapters")


def problems(wheel: Path, root: Path) -> list[str]:
    """What is wrong with `wheel`, built from the checkout `root`; empty if nothing is."""
    names = set(zipfile.ZipFile(wheel).namelist())
    found = []
    sources = {path for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    markers = {path for folder in FOLDERS for path in (root / folder).rglob("py.typed")}
    expected = {f"prunus/{path.relative_to(root).as_posix()}" for path in sources | markers}
    expected.add("prunus/registry.toml")
    found += [f"missing: {name}" for name in sorted(expected - names)]
    inside = {name for name in names if ".dist-info/" not in name}
    found += [f"too much: {name}" for name in sorted(inside - expected)]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        found.append("missing: LICENSE")
    points = next((name for name in names if name.endswith("entry_points.txt")), None)
    text = zipfile.ZipFile(wheel).read(points).decode() if points else ""
    found += [f"missing: command {command}" for command in ("optimize", "prunus") if f"{command} = " not in text]
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(wrong) or f"wheel {Path(sys.argv[1]).name} holds what it should")
    sys.exit(1 if wrong else 0)
