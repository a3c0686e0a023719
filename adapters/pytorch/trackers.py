"""Experiment trackers by name, as accelerate knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.core.errors import ConfigError
from prunus.core.tracking import Tracker


def open_trackers(names: Sequence[str], run: str, folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Started, with the `settings` of the run called `run` told; what writes files writes them into `folder`.

    Raises ConfigError for a name that accelerate does not know and for one whose package is missing.
    """
    if not names:
        return []
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError:
        raise ConfigError(
            "--track needs accelerate; install it with: pip install 'prunus[distributed]'", key="track"
        ) from None
    known, there = sorted(LOGGER_TYPE_TO_CLASS), {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--track {name}: there is no such tracker; known are {', '.join(known)}", key="track"
            )
        if name not in there:
            raise ConfigError(
                f"--track {name}: its package is not installed here (pip install {name})", key="track"
            )
    PartialState()  # trackers write from the first process only, which this tells
    opened = []
    for name in dict.fromkeys(names):
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if tracker_class.requires_logging_directory:
            tracker = tracker_class(name, logging_dir=folder)
        else:
            tracker = tracker_class(run)
        tracker.start()
        tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
        opened.append(tracker)
    return opened
