"""A finished run: reading it, opening its model again, and what can be done with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.core.errors import LoadError
from prunus.core.plan import UNNAMED
from prunus.core.plugin_settings import first_problem
from prunus.core.report import Report
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings

_LARGEST = 8192
"""Channels, rows or columns of an image; a report that says more is damaged."""


def read_report(folder: Path) -> Report:
    """report.json of a finished run, `run` being where it lies now.

    Raises LoadError naming what is missing or damaged.
    """
    try:
        report = Report.model_validate(RunFolder(folder).read_json("report.json"))
    except ValidationError as error:
        raise LoadError(f"{folder / 'report.json'} is damaged: {first_problem(error)}") from None
    return report.model_copy(update={"run": str(folder)})


def image_size(report: Report) -> tuple[int, int, int]:
    """(channels, height, width) of the run's images. Raises LoadError where no image is like that."""
    if not all(1 <= n <= _LARGEST for n in report.input_size):
        raise LoadError(f"the report of {report.run} is damaged: no image is {report.input_size}")
    return report.input_size


def settings_for(folder: Path, trust: bool, **changes: Any) -> RunSettings:
    """The run's settings, to open its model again: nothing is trained, nor loaded that the run has replaced since.

    Changes of None are left out. Raises ConfigError if the settings name code and `trust` is false.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    without = {"teachers": (), "pretrained": False, "checkpoint": None, "epochs": 0.0, "dense_epochs": 0.0}
    return RunFolder(folder).read_settings(trust).model_copy(update={**without, **given})


def uses(report: Report) -> dict[str, str]:
    """What can be done with the result: by commands where they can make its model, else in Python alone."""
    load, run = "prunus.adapters.pytorch.load", json.dumps(report.run, ensure_ascii=False)
    if report.model.startswith(UNNAMED):
        return {"in Python": f"{load}({run}, original={report.model.rpartition('.')[2]}(...))"}
    folder = shlex.quote(report.run)
    trust = " --trust" if RunSettings.model_construct(**report.settings).code else ""
    judged = report.pruned.accuracy is not None  # without data or labels there is nothing to evaluate on
    return {
        **({"evaluate": f"optimize evaluate {folder}{trust}"} if judged else {}),
        "export": f"optimize export {folder}{trust} --format onnx",
        "in Python": f"{load}({run}{', trust=True' if ':' in report.model else ''})",
    }


def repeat(report: Report) -> str | None:
    """The command that runs the same again; None where the model was an object in Python."""
    if report.model.startswith(UNNAMED):
        return None
    return shlex.join(["optimize", "prune", "--config", f"{report.run}/run.toml"])
