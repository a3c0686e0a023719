"""`--target latency=...`: met as measured, decided once per run, refused clearly."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from prunus.core.cli import run
from prunus.core.cost import CostTerm, Extent
from prunus.core.errors import JournalError
from prunus.core.latency import LatencyTable
from prunus.core.latency_target import read_table, write_table
from prunus.core.run_folder import RunFolder

pytestmark = pytest.mark.slow  # times real operators: on a machine whose clock drifts by factors no limit holds

WORDS = [
    "prune",
    "--plugin",
    "one-shot",
    "--data",
    "none",
    "--model",
    "prunus/resnet14",
    "--img-size",
    "64",  # operators long enough to be timed on a machine that does other things, too
    "--threads",
    "1",
    "--json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "timed"
    assert run([*WORDS, "--target", "latency=60%", "--target", "params=90%", "--output", str(folder)]) in (0, 3)
    return folder


def test_a_latency_share_is_predicted_within_the_target_and_measured(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    latency = report["latency"]
    assert latency["limit"] == pytest.approx(0.6 * latency["dense"])
    assert 0.95 * latency["limit"] <= latency["predicted"] <= latency["limit"]
    assert latency["pruned"] == pytest.approx(latency["predicted"], rel=0.3)
    assert report["target_met"] == (latency["pruned"] <= latency["limit"])
    assert re.search(r"latency target .* ms (met|missed): measured .* ms, predicted .* ms", latency["message"])
    assert report["pruned"]["params"] <= report["limits"]["params"]


def test_the_table_is_kept_with_the_run_and_reads_back_the_same(finished: Path, tmp_path: Path) -> None:
    table = read_table(RunFolder(finished))
    assert table.threads == 1 and table.batch == 1 and len(table.checks) == 4
    assert all(term.quantity == "latency" for term in table.terms)
    write_table(RunFolder(tmp_path), table)
    assert read_table(RunFolder(tmp_path)) == table


def test_a_resumed_run_decides_by_its_own_table(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    before = json.loads((folder / "plan.json").read_text())["keep"]
    assert run(["prune", "--resume", str(folder), "--json"]) in (0, 3)
    assert json.loads((folder / "plan.json").read_text())["keep"] == before


def test_an_unreachable_latency_names_the_smallest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--target", "latency=1us", "--output", str(tmp_path / "run")]) == 3
    assert re.search(
        r"latency=1us cannot be reached: the smallest reachable is latency=[\d.]+us", capfd.readouterr().err
    )
    assert not (tmp_path / "run").exists()


TABLE = LatencyTable((CostTerm("latency", "conv", 1e-6, (Extent(0, ((1, ("a",)),)),)),), 1e-3, ((1.0, 2.0),), 1, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:40], "damaged"),
        (lambda text: text.replace("1e-6", "-1.0").replace("0.000001", "-1.0"), "negative"),
        (lambda text: text.replace('"latency"', '"macs"'), "another quantity"),
        (lambda text: text.replace('"dense"', '"sparse"'), "damaged: dense"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    write_table(RunFolder(tmp_path), TABLE)
    file = tmp_path / "latency.json"
    file.write_text(damage(file.read_text()))  # type: ignore[operator]
    with pytest.raises(JournalError, match=message):
        read_table(RunFolder(tmp_path))


def test_a_run_that_lost_its_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"latency\.json cannot be read"):
        read_table(RunFolder(tmp_path))
