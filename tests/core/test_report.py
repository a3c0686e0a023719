"""The report's page: whole in one file, safe, and readable without JavaScript."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prunus.core.charts import Series, heat_map, kept_bars, line_chart, ticks
from prunus.core.display import bar, by_stage, human, proof, summary
from prunus.core.kernels import Kernel
from prunus.core.model_card import model_card
from prunus.core.report import Depth, Layer, Report, Width
from prunus.core.report_page import render
from prunus.core.testing.graphs import residual_graph

EVIL = '<script>alert("x")</script>'


def _round(i: int) -> dict[str, object]:
    return {"round": i, "probability/layer1": [0.1, 1 / i], "loss/a": 1 / i, "loss/b": 2 / i, "rewards": [i, -i]}


LATENCY = {
    "limit": 0.012,
    "dense": 0.02,
    "pruned": 0.0115,
    "predicted": 0.0119,
    "threads": 1,
    "check_errors": [0.02],
    "message": "latency target 12 ms met",
}


def _report(**changes: object) -> Report:
    history = [
        {"index": 0, "kind": "Train", "seconds": 9.0, "loss": 1.0, "accuracy": 0.5},
        {"index": 1, "kind": "Evaluate", "seconds": 1.0, "loss": 0.9, "accuracy": 0.6, "model": None},
        {"index": 2, "kind": "Remove", "seconds": 0.5, "macs": 50},
        *({"index": i, "kind": "Note", "note": "anneal", "values": {"temperature": 1 / i}} for i in range(3, 9)),
        *({"index": i, "kind": "Note", "note": "round", "values": _round(i)} for i in range(9, 12)),
        {"index": 12, "kind": "Note", "note": "distillation", "values": {"used": 1}},
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
        "latency": LATENCY,
        "widths": [
            {"name": "layer1.0.conv1.weight", "units": 16, "kept": 8},
            {"name": "head.weight", "units": 10, "kept": 10, "locked": "model output"},
        ],
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
        "--config runs/a",
    ):
        assert words in page


def test_the_page_has_every_section() -> None:
    page = render(_report())
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Before and after", "Over the run", "Widths", "Repeat it", "Environment"]
    parts = re.findall(r"<h3>(.*?)</h3>", page)
    assert parts == ["Latency", "Result", "Method: anneal", "Method: round", "Noted once"]
    charts = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert charts == [
        "Accuracy", "Loss (cross entropy)", "MACs of one image", "temperature", "loss", "rewards",
        "probability, mean of each group",
    ]  # fmt: skip
    for words in ("20.000", "11.500", "Latency target 12 ms met", "model output", "used 1", "torch", "seed = 0"):
        assert words in page


def test_the_chart_of_macs_begins_with_the_dense_model_and_shows_the_target() -> None:
    page = render(_report())
    chart = page[page.index("MACs of one image") :]
    model, target = re.findall(r'points="([^"]+)"', chart)[:2]
    heights = [float(point.split(",")[1]) for point in model.split()]
    assert heights[0] < heights[-1] == float(target.split(",")[1].split()[0])


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_evenly_spaced_round_and_span_the_range(low: float, length: float) -> None:
    high = low + length
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    found = ticks(low, high)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 7
    assert found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step
    digit = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(digit - d) for d in (1, 2, 5)) < 1e-2


def test_a_map_has_a_cell_for_every_value() -> None:
    assert heat_map("p", [("a", [0.0, 1.0, 0.5]), ("b", [1.0, 1.0, 1.0])], "round").count("<rect") == 6
    assert heat_map("p", [], "round") == ""


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
    assert line_chart("t", [Series("s", [], [])], "x") == ""
    assert kept_bars([], "nothing") == ""


def test_a_constant_series_is_drawn_inside_the_plot() -> None:
    chart = line_chart("t", [Series("s", [1.0, 2.0], [5.0, 5.0])], "x")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    assert all(0 <= float(v) <= 380 for pair in points[1].split() for v in pair.split(","))


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


def test_layers_that_went_are_named_in_terminal_page_and_card() -> None:
    depth = {"blocks": 5, "removed": ["layer1.1", "layer3.2"], "kernels": 9, "reduced": ["layer2.0.conv1"]}
    report = _report(depth=depth)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(report))
    text = console.export_text()
    for said in ("Blocks removed: 2 of 5 (layer1.1, layer3.2).", "Kernels now 1 x 1: 1 of 9 (layer2.0.conv1)."):
        assert said in text
        assert said in render(report)
    assert "1 of 9 kernels became 1 x 1" in model_card(report, "load()", [])
    assert "2 of 5 residual blocks were taken out" in model_card(report, "load()", [])
    assert "Blocks removed" not in render(_report())


def test_the_page_draws_the_shape_of_what_is_left_layer_by_layer() -> None:
    graph = residual_graph(8, [6, 4])
    dense = graph.with_kernels([Kernel("block1.conv1", "block1.conv1.weight", 3)])
    pruned = dense.restrict({"inner1": [0, 2, 3]}).without_kernels(["block1.conv1"])
    layers = {layer.name: layer for layer in Layer.between(dense, pruned.without_blocks(["block0"]))}
    assert layers["block0.conv1.weight"].after is None
    assert layers["block1.conv1.weight"].before == (4, 8, 3, 3)
    assert layers["block1.conv1.weight"].after == (3, 8, 1, 1)
    assert layers["block1.conv2.weight"].after == (8, 3, 3, 3)
    assert not any(len(layer.before) == 1 for layer in layers.values())  # weights alone, no biases
    page = render(_report(layers=[layer.model_dump() for layer in layers.values()]))
    for said in ("4 × 8 × 3 × 3 → 3 × 8 × 1 × 1", "6 × 8 × 3 × 3, gone", f"{len(layers)} layers"):
        assert said in page
    assert page.count('class="gone"/>') == 2  # the two convolutions of the block


def test_a_report_from_before_blocks_is_read() -> None:
    assert _report().depth.removed == []


def test_what_went_is_the_difference_of_two_graphs() -> None:
    graph = residual_graph(8, [6, 4])
    names = ("block0.conv1", "block1.conv1", "block1.conv2")
    dense = graph.with_kernels(Kernel(name, f"{name}.weight", 3) for name in names)
    pruned = dense.without_kernels(["block1.conv2"]).without_blocks(["block0"])
    depth = Depth.between(dense, pruned)
    assert (depth.blocks, depth.removed) == (2, ["block0"])
    assert (depth.kernels, depth.reduced) == (3, ["block1.conv2"])  # that of the block went with it
