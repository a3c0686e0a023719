"""A third-party package, ready to be filled in: `optimize plugins new NAME`."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Literal

from prunus.core.errors import ConfigError

Offer = Literal["importance", "plugins"]
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "prunus-$name"
version = "0.1.0"
description = "$title, for prunus."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["prunus"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points."prunus.$offer"]
$name = "$module:$cls"

[tool.setuptools]
py-modules = ["$module"]
"""

_README = """\
# prunus-$name

$title, for [prunus](https://pypi.org/project/prunus/).

    pip install .
    optimize plugins list
    optimize plugins check $name
    optimize prune $use

Tests: `pip install -e '.[test]' && pytest`.
"""

_IMPORTANCE = '''\
"""$title."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from prunus.core import ChannelGroup, FloatArray, ImportanceEstimator, PluginConfig, Signal, SignalReader


class ${cls}Config(PluginConfig):
    power: float = Field(default=2.0, gt=0)
    """Exponent of the weights."""


class $cls(ImportanceEstimator):
    """The sum of |weight| ** power over everything that writes a unit."""

    Config: ClassVar[type[PluginConfig]] = ${cls}Config
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        config = self.config
        assert isinstance(config, ${cls}Config)
        scores = np.zeros(group.units)
        for piece in group.with_role("writes"):
            rows = np.moveaxis(signals.read(Signal.WEIGHT, piece.tensor), piece.axis, 0)
            energy = (np.abs(rows) ** config.power).reshape(len(rows), -1).sum(axis=1)
            mine = piece.unit_of >= 0
            np.add.at(scores, piece.unit_of[mine], energy[mine])
        return scores
'''

_POLICY = '''\
"""$title."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import numpy as np
from pydantic import Field

from prunus.core import (
    Changed,
    Directive,
    Measure,
    Observation,
    PluginConfig,
    PruningPlan,
    PruningPolicy,
    PruningTask,
    Remove,
    Signal,
    Train,
)
from prunus.core.allocation import global_keep


class ${cls}Config(PluginConfig):
    images: int = Field(default=1024, ge=1)
    """Calibration images for the refit after removal."""


class $cls(PruningPolicy):
    """Keep the units with the largest biases and weights, refit the rest, train."""

    Config: ClassVar[type[PluginConfig]] = ${cls}Config

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, ${cls}Config)
        signals = yield Measure(frozenset({Signal.WEIGHT}))
        scores = {}
        for name, group in task.graph.groups.items():
            scores[name] = np.zeros(group.units)
            for piece in group.with_role("writes"):
                rows = np.moveaxis(signals.read(Signal.WEIGHT, piece.tensor), piece.axis, 0)
                mine = piece.unit_of >= 0
                energy = np.square(rows).reshape(len(rows), -1).sum(axis=1)
                np.add.at(scores[name], piece.unit_of[mine], energy[mine])
        keep = global_keep(task.graph, task.budget, scores)
        changed = yield Remove(keep, refit="sequential" if task.has_data else "none", images=config.images)
        assert isinstance(changed, Changed)
        if task.epochs > 0:
            yield Train(epochs=task.epochs, label="recover")
        return changed.plan
'''

_TEST = '''\
"""The contract that every $noun of prunus keeps."""

from __future__ import annotations

import pytest

from $module import $cls
from prunus.core.testing.${kit}_contract import ${contract}Contract


class Test$cls(${contract}Contract):
    @pytest.fixture
    def $fixture(self) -> type[$cls]:
        return $cls
'''

_KINDS: dict[Offer, dict[str, str]] = {
    "importance": {"noun": "estimator", "kit": "importance", "contract": "Importance", "fixture": "estimator"},
    "plugins": {"noun": "method", "kit": "policy", "contract": "Policy", "fixture": "policy"},
}


def scaffold(name: str, offer: Offer, folder: Path) -> tuple[Path, ...]:
    """Write the package into `folder`, which must not exist or be empty; returns the files.

    Raises ConfigError for a name that cannot be a package's, or a folder that holds something.
    """
    module = f"prunus_{name.replace('-', '_')}"
    if not _NAME.fullmatch(name) or keyword.iskeyword(module):
        raise ConfigError(f"name {name!r} must be small letters, digits and single dashes", key="name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another --output", key="output")
    cls = "".join(part.capitalize() for part in name.split("-"))
    use = f"--plugin one-shot --importance {name}" if offer == "importance" else f"--plugin {name}"
    words = {"name": name, "module": module, "cls": cls, "offer": offer, "use": use, **_KINDS[offer]}
    words["title"] = f"{cls}: a pruning {words['noun']}"
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{module}.py": _IMPORTANCE if offer == "importance" else _POLICY,
        f"tests/test_{module}.py": _TEST,
    }
    return tuple(_write(folder / path, text, words) for path, text in files.items())


def _write(path: Path, text: str, words: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Template(text).substitute(words), "utf-8")
    return path
