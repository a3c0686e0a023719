"""The tables of the documents are what the committed cells say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.marks import Contest, margin, marks_table, tables
from prunus.core.compare_protocol import Protocol, read_protocol
from prunus.core.compare_record import CellRecord, DenseRecord, Outcome, named
from prunus.core.compare_table import Results

ROOT = Path(__file__).parents[2]
NETWORKS = {"here": (0.90, 0.91), "elsewhere": (0.91, 0.92)}
"""Where a dense network was trained -> its accuracy on test and held out."""


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return read_protocol(ROOT / "benchmarks" / "protocols" / "fashion_fast.toml")


def test_documents_show_the_tables_of_the_committed_cells() -> None:
    for document, shown in tables().items():
        text = (ROOT / document).read_text("utf-8")
        for table in shown:
            assert table in text, f"{document} lacks:\n{table}\nrun python -m benchmarks.marks"


def test_a_margin_pairs_seeds_that_start_from_one_dense_network(protocol: Protocol) -> None:
    results = _results(
        protocol,
        *_cells(protocol, "gsm-anneal", test={0: 0.88, 1: 0.87, 2: 0.89}),
        *_cells(protocol, "TP L2 uniform", test={0: 0.86, 1: 0.86, 3: 0.99}),
        *_cells(protocol, "TP Taylor uniform", test={0: 0.99, 1: 0.99, 2: 0.99}, network="elsewhere"),
    )
    assert _margin(results, "TP L2 uniform", "TP Taylor uniform") == pytest.approx([0.02, 0.01])


def test_a_network_from_scratch_is_compared_whatever_dense_network_its_seed_has(protocol: Protocol) -> None:
    results = _results(
        protocol,
        *_cells(protocol, "gsm-anneal", test={0: 0.88}),
        *_cells(protocol, "narrow equal MACs", test={0: 0.89}, network="elsewhere", uses_dense=False),
    )
    assert _margin(results, "narrow equal MACs") == pytest.approx([-0.01])


def test_ours_is_chosen_on_the_held_out_part_and_the_rival_on_test(protocol: Protocol) -> None:
    results = _results(
        protocol,
        *_cells(protocol, "gsm-anneal", test={0: 0.80}, holdout=0.90),
        *_cells(protocol, "bayes-reparam", test={0: 0.95}, holdout=0.89),
        *_cells(protocol, "TP L2 uniform", test={0: 0.70}, holdout=0.99),
        *_cells(protocol, "TP Taylor uniform", test={0: 0.75}, holdout=0.1),
    )
    assert _margin(results, "TP L2 uniform", "TP Taylor uniform") == pytest.approx([0.05])


def test_a_lucky_seed_is_no_rival_where_others_have_three(protocol: Protocol) -> None:
    three = {0: 0.80, 1: 0.81, 2: 0.82}
    results = _results(
        protocol,
        *_cells(protocol, "gsm-anneal", test={seed: value + 0.01 for seed, value in three.items()}),
        *_cells(protocol, "TP L2 uniform", test=three),
        *_cells(protocol, "TP L2 global", test={1: 0.9}),
    )
    found = _margin(results, "TP L2 uniform", "TP L2 global")
    assert len(found) == 3
    assert fmean(found) == pytest.approx(0.01)


def test_a_mark_is_bold_only_where_it_is_reached(protocol: Protocol) -> None:
    def shown(ours: float) -> str:
        cells = [
            *_cells(protocol, "gsm-anneal", test=dict.fromkeys(range(5), ours)),
            *_cells(protocol, "TP L2 uniform", test=dict.fromkeys(range(5), 0.85)),
        ]
        return marks_table(_results(protocol, *cells))

    assert "**+1.50**" in shown(0.865)
    assert "| +1.49 |" in shown(0.8649)


def test_more_seeds_are_no_merit_of_ours_but_three_are_wanted(protocol: Protocol) -> None:
    results = _results(
        protocol,
        *_cells(protocol, "gsm-anneal", test={0: 0.80, 1: 0.80, 2: 0.80, 3: 0.95, 4: 0.95}, holdout=0.89),
        *_cells(protocol, "bayes-reparam", test={0: 0.85, 1: 0.85, 2: 0.85}, holdout=0.90),
        *_cells(protocol, "joint-search", test={0: 0.99, 1: 0.99}, holdout=0.99, uses_dense=False),
        *_cells(protocol, "TP L2 uniform", test={0: 0.70, 1: 0.70, 2: 0.70}),
    )
    contest = Contest("", ("gsm-anneal", "bayes-reparam", "joint-search"), ("TP L2 uniform",))
    assert margin(results, contest, "macs=25%", 1.5) == pytest.approx([0.15, 0.15, 0.15])


def _margin(results: Results, *rivals: str) -> list[float]:
    contest = Contest("ours against theirs", ("gsm-anneal", "bayes-reparam"), rivals)
    return margin(results, contest, "macs=25%", 1.5)


def _results(protocol: Protocol, *records: CellRecord) -> Results:
    return Results(protocol, records, again="")


def _cells(
    protocol: Protocol,
    entry: str,
    *,
    test: dict[int, float],
    holdout: float = 0.9,
    network: str = "here",
    uses_dense: bool = True,
) -> Iterator[CellRecord]:
    """Records at 25% after 1.5 epochs, by seed."""
    accuracy, held_out = NETWORKS[network]
    for cell in protocol.select([f"{entry}/macs=25%/1.5ep/plain/*"]):
        if cell.seed in test:
            yield CellRecord(
                **named(cell, key="0"),  # type: ignore[arg-type]
                status="done",
                dense=DenseRecord(
                    seed=cell.seed, accuracy=accuracy, holdout=held_out, macs=4.0, training_macs=8.0, seconds=1.0,
                    content=network,
                ),
                outcome=Outcome(
                    accuracy=test[cell.seed], holdout=holdout, macs=1.0, params=1.0, training_macs=1.0,
                    uses_dense=uses_dense,
                ),
            )  # fmt: skip
