"""The simulated network as a session, so that the whole command line runs without a framework.

A registry file makes it known:

    [adapters.simulated]
    target = "prunus.core.testing.simulated_session:open_session"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.core.adapter import Description
from prunus.core.directives import Evaluate, Evaluated, Remove
from prunus.core.errors import LoadError, PlanError
from prunus.core.files import write_atomically
from prunus.core.graph import ChannelGraph
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.settings import RunSettings
from prunus.core.testing.simulation import SimulatedAdapter

WIDTHS: dict[str, tuple[int, ...]] = {"simulated/small": (8, 24, 16, 4), "simulated/wide": (8, 64, 48, 4)}


class SimulatedSession:
    """`Session` over a `SimulatedAdapter`; "test" is its held-out part."""

    def __init__(self, settings: RunSettings) -> None:
        name = settings.model or "simulated/small"
        if name not in WIDTHS:
            raise LoadError(f"there is no model {name!r}; there are {', '.join(sorted(WIDTHS))}")
        filled = {
            "model": name,
            "epochs": 2.0 if settings.epochs is None else settings.epochs,
            "dense_epochs": 4.0,
        }
        self.settings = settings.model_copy(update=filled)
        self.has_data = self.has_labels = settings.data != "none"
        self.classes = WIDTHS[name][-1]
        self.teachers: tuple[str, ...] = ()
        self.dense_needs_training = self.has_data
        self.adapter = SimulatedAdapter(
            WIDTHS[name], seed=settings.seed, samples=256, dense_epochs=0, min_share=settings.min_share
        )
        self.source = ModelSource(name=name)

    @property
    def graph(self) -> ChannelGraph:
        return self.adapter.trace()

    def describe(self) -> Description:
        name = self.source.name
        images = self.adapter.images if self.has_data else {}
        return Description(name, (WIDTHS[name][0], 1, 1), self.classes, self.settings.data, images, "cpu", {})

    def test(self) -> Evaluated | None:
        return self.adapter.evaluate(Evaluate()) if self.has_data else None

    def save(self, folder: Path, plan: PruningPlan, report: Mapping[str, Any]) -> None:
        data = plan.model_copy(update={"model": self.source}).model_dump(mode="json", by_alias=True)
        write_atomically(folder / "plan.json", json.dumps(data))

    def load(self, folder: Path) -> None:
        try:
            plan = PruningPlan.model_validate_json((folder / "plan.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{folder / 'plan.json'} cannot be used: {error}") from None
        self.adapter.remove(Remove(plan.keep))


def open_session(settings: RunSettings) -> SimulatedSession:
    """What the registry names."""
    return SimulatedSession(settings)
