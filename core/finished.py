"""A finished run, as commands that work on its model read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.core.errors import LoadError
from prunus.core.plugin_settings import first_problem
from prunus.core.report import Report
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings

_LARGEST = 8192
"""Channels, rows or columns of an image; a report that says more is damaged."""


def read_report(folder: Path) -> Report:
    """report.json of a finished run. Raises LoadError if it is missing or damaged."""
    try:
        report = Report.model_validate(RunFolder(folder).read_json("report.json"))
    except ValidationError as error:
        raise LoadError(f"{folder / 'report.json'} is damaged: {first_problem(error)}") from None
    if not all(1 <= n <= _LARGEST for n in report.input_size):
        raise LoadError(f"{folder / 'report.json'} is damaged: no image is {report.input_size}")
    return report


def settings_for(folder: Path, trust: bool, **changes: Any) -> RunSettings:
    """The run's settings, to open its model again: nothing is loaded that the run has replaced since.

    Changes of None are left out. Raises ConfigError if the settings name code and `trust` is false.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    without = {"teachers": (), "pretrained": False, "checkpoint": None}
    return RunFolder(folder).read_settings(trust).model_copy(update={**without, **given})
