"""The report's page: whole in one file, safe, and readable without JavaScript."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from prunus.core.charts import Series, line_chart, width_bars
from prunus.core.display import bar, by_stage, human, proof
from prunus.core.report import Report, Width
from prunus.core.report_page import render

EVIL = '<script>alert("x")</script>'


def _report(**changes: object) -> Report:
    history = [
        {"index": 0, "kind": "Train", "loss": 1.0, "accuracy": 0.5},
        {"index": 1, "kind": "Evaluate", "loss": 0.9, "accuracy": 0.6, "model": None},
        {"index": 2, "kind": "Remove", "macs": 50},
        *({"index": i, "kind": "Note", "note": "anneal", "values": {"temperature": 1 / i}} for i in range(3, 9)),
    ]
    data: dict[str, object] = {
        "schema": 1,
        "run": "runs/a",
        "model": "timm/x",
        "plugin": "one-shot",
        "targets": ["macs=50%"],
        "target_met": True,
        "limits": {"macs": 50.0},
        "dense": {"macs": 100, "params": 10, "bytes": 40, "accuracy": 0.9},
        "pruned": {"macs": 50, "params": 5, "bytes": 20, "accuracy": 0.89},
        "verification": {"kind": "exact", "max_error": 1e-7, "scale": 2.0},
        "seconds": 12.0,
        "training_macs": 1e9,
        "data": "digits",
        "input_size": (3, 32, 32),
        "classes": 10,
        "images": {"train": 100},
        "widths": [{"name": "layer1.0.conv1.weight", "units": 16, "kept": 8}],
        "history": history,
        "settings": {"seed": 0},
        "versions": {"torch": "2"},
        "notes": [],
    }
    return Report.model_validate({**data, **changes})


class _Tags(HTMLParser):
    VOID = frozenset({"meta", "rect", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = render(_report())
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)


def test_the_page_says_what_matters() -> None:
    page = render(_report())
    for words in (
        "50.0%",
        "89.00%",
        "target met",
        "layer1.0.conv1.weight",
        "anneal: temperature",
        "--config runs/a",
    ):
        assert words in page


def test_names_from_files_never_become_markup() -> None:
    page = render(
        _report(model=EVIL, notes=[EVIL], settings={"x": EVIL}, widths=[{"name": EVIL, "units": 2, "kept": 1}])
    )
    assert EVIL not in page
    assert "&lt;script&gt;" in page


def test_a_report_without_data_or_removals_has_a_page() -> None:
    size = {"macs": 1, "params": 1, "bytes": 1, "accuracy": None}
    skipped = {"kind": "skipped", "max_error": 0, "scale": 0}
    report = _report(dense=size, pruned=size, history=[], widths=[], verification=skipped)
    assert "Not verified" in render(report)


def test_a_chart_without_points_is_nothing() -> None:
    assert line_chart("t", [Series("s", [], [])], "x", "y") == ""
    assert width_bars([]) == ""


def test_a_constant_series_is_drawn_inside_the_plot() -> None:
    chart = line_chart("t", [Series("s", [1.0, 2.0], [5.0, 5.0])], "x", "y")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    assert all(0 <= float(v) <= 640 for pair in points[1].split() for v in pair.split(","))


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0, "", "0"), (999, "B", "999 B"), (1234567, "B", "1.23 MB"), (4.1e9, "", "4.1 G")],
)
def test_numbers_for_people(number: float, unit: str, text: str) -> None:
    assert human(number, unit) == text


def test_groups_are_gathered_by_stage() -> None:
    names = [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.1.conv1.weight",
        "blocks.0.a.weight",
        "blocks.1.a.weight",
    ]
    stages = by_stage(Width(name=name, units=2, kept=1) for name in names)
    assert [(stage, len(members)) for stage, members in stages] == [
        ("conv1", 1), ("layer1", 2), ("blocks.0", 1), ("blocks.1", 1)
    ]  # fmt: skip


def test_a_bar_is_as_full_as_its_share() -> None:
    assert bar(0.5, 10) == "█████░░░░░ 50%"


def test_the_proof_names_the_error_and_its_scale() -> None:
    assert "at most 1.0e-07 (5.0e-08 of their scale)" in proof(_report())
