"""Commands on a finished run: what they refuse to overwrite, what they say of it, and where it lies now."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from prunus.core.adapter import Description
from prunus.core.budget import Budget
from prunus.core.cli import run
from prunus.core.display import RunDisplay
from prunus.core.errors import ConfigError
from prunus.core.finished import read_report, settings_for, uses
from prunus.core.report_page import render
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings
from prunus.core.testing.graphs import residual_graph

EXPORTING = '''
from prunus.core.errors import ConfigError
from prunus.core.export import ExportReport, Parity
from prunus.core.testing.simulated_session import SimulatedSession


class Session(SimulatedSession):
    """One that exports, and whose images:DIR have no labels, so that it trains nothing on them."""

    def __init__(self, settings):
        super().__init__(settings)
        if settings.data.startswith("images:"):
            self.has_labels = self.dense_needs_training = False
            if self.settings.epochs:
                raise ConfigError(f"nothing can be trained without labels; got --epochs {self.settings.epochs:g}")

    def export(self, folder, path, form, input_size):
        path.mkdir() if form == "hub" else path.write_text("exported")
        return ExportReport(path, form, 8, True, (Parity("random", 2, 0.0, 1.0),), ("fixed [/b]",))
'''
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command on the simulated adapter, in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "exporting_adapter.py").write_text(EXPORTING)
    (tmp_path / "registry.toml").write_text("[adapters.simulated]\ntarget = 'exporting_adapter:Session'\n")
    sys.modules.pop("exporting_adapter", None)

    def one(*words: str) -> tuple[int, str, str]:
        code = run([*words, *(() if words[0] == "report" else ("--registry", "registry.toml"))])
        said = capsys.readouterr()
        return code, said.out, said.err

    return one


def _prune(call: Call, folder: str, *words: str) -> tuple[int, str, str]:
    made = call("prune", "--plugin", "one-shot", "--adapter", "simulated", "--output", folder, *words)
    assert made[0] == 0, made
    return made


@pytest.mark.parametrize(
    ("output", "form"),
    [
        ("runs/a/model.safetensors", "onnx"),
        ("runs/a/run.toml", "program"),
        ("runs/b/../a/plan.json", "onnx"),
        ("runs/a/journal/model.onnx", "onnx"),
        ("runs/a/checkpoint", "hub"),
        ("runs/a", "hub"),
        ("link.onnx", "onnx"),
    ],
)
def test_an_export_never_overwrites_what_a_run_is_made_of(call: Call, output: str, form: str) -> None:
    _prune(call, "runs/a")
    Path("link.onnx").symlink_to("runs/a/report.json")
    before = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    code, _, said = call("export", "runs/a", "--format", form, "--output", output)
    assert code == 2
    assert "belongs to the run in" in said
    assert before == {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}


def test_exports_lie_in_the_run_or_elsewhere_and_a_folder_is_no_file(call: Call) -> None:
    _prune(call, "runs/a")
    code, _, said = call("export", "runs/a", "--output", "runs")
    assert code == 2
    assert "--output runs is a folder; --format onnx writes a file" in said
    for words in ([], ["--format", "program"], ["--format", "hub"], ["--output", "runs/a/mine.onnx"]):
        assert call("export", "runs/a", *words)[0] == 0
    assert call("export", "runs/a", "--output", "mine.onnx")[0] == 0


@pytest.mark.parametrize("folder", ["runs/br[/b]", "runs/v[draft]", "runs/a:cat:"])
def test_the_name_of_a_folder_is_no_markup(call: Call, folder: str) -> None:
    said = _prune(call, folder)[1]
    assert f"Run folder: {folder}" in said
    assert f"evaluate {folder}" in said.replace("'", "")
    again = call("report", folder)
    assert again[0] == 0
    assert f"evaluate {folder}" in again[1].replace("'", "")
    code, said, _ = call("export", folder)
    assert code == 0
    assert f"{folder}/model.onnx: onnx" in said
    assert "note: fixed [/b]" in said


def test_no_name_at_the_start_of_a_run_is_markup() -> None:
    file = io.StringIO()
    names = ("python:m[/b]:f", "images:x[/b]", "a[/b]:B", "c[/b]:D")
    description = Description(names[0], (3, 8, 8), 10, names[1], {}, "cpu", {})
    display = RunDisplay(Console(file=file, width=200))
    budget = Budget.resolve(RunSettings().parsed_targets, residual_graph(8, [6, 4]).cost())
    display.opened(description, RunSettings(plugin=names[2], importance=names[3]), budget)
    assert all(name in file.getvalue() for name in names)


def test_a_finished_run_is_opened_without_training_anything(call: Call) -> None:
    _prune(call, "runs/a", "--epochs", "1", "--dense-epochs", "1")
    settings = settings_for(Path("runs/a"), trust=False)
    assert (settings.epochs, settings.dense_epochs) == (0, 0)
    assert call("export", "runs/a", "--data", "images:x")[0] == 0
    code, out, said = call("evaluate", "runs/a", "--data", "images:x")
    assert (code, out) == (2, "")
    assert "nothing to evaluate without labels, and images:x has none" in said


def test_evaluating_on_no_data_is_refused_before_anything_is_opened(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prune(call, "runs/a")
    _prune(call, "runs/none", "--data", "none")
    monkeypatch.setattr("prunus.core.cli_inspect._open", None)
    for words, why in ((("runs/a", "--data", "none"), "--data none"), (("runs/none",), "was made without data")):
        code, _, said = call("evaluate", *words)
        assert code == 2
        assert why in said
        assert "name labelled data with --data" in said


def test_a_run_without_data_does_not_advise_to_evaluate_it(call: Call) -> None:
    said = _prune(call, "runs/a", "--data", "none")[1]
    assert "optimize evaluate" not in said
    assert "in Python" in said
    assert "evaluate" not in uses(read_report(Path("runs/a")))
    assert "optimize evaluate" in _prune(call, "runs/b")[1]


def test_a_copied_or_moved_run_is_spoken_of_where_it_lies(call: Call) -> None:
    _prune(call, "runs/a")
    shutil.move("runs/a", "runs/moved")
    assert "Run folder: runs/moved" in call("report", "runs/moved")[1]
    assert json.loads(call("report", "runs/moved", "--json")[1])["run"] == "runs/moved"
    page = Path("runs/moved/report.html").read_text()
    assert page == render(read_report(Path("runs/moved")))
    assert "runs/moved/run.toml" in page
    assert "runs/a" not in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plugin", "nomod:Cls"], "plugin 'nomod:Cls': its module must exist"),
        (["--plugin", "os:path"], "plugin 'os:path': its target must be a class"),
        (["--plugin", "os:none"], "plugin 'os:none': its target must exist"),
        (["--importance", "json:JSONDecoder"], "must derive from prunus.core.ImportanceEstimator"),
        (["--adapter", "nomod:open"], "adapter 'nomod:open': its module must exist"),
        (["--adapter", "os:sep"], "a function that opens a session"),
    ],
)
def test_a_mistyped_name_of_code_is_a_wrong_call(call: Call, words: list[str], said: str) -> None:
    code, _, err = call("prune", "--plugin", "one-shot", "--adapter", "simulated", "--output", "runs/a", *words)
    assert (code, "broke a rule" in err) == (2, False)
    assert said in err


PROTOCOL = """
title = "t"
adapter = "simulated"
model = "simulated/small"
data = "digits"
targets = ["macs=50%"]
epochs = [0.0]
seeds = [0]
dense = {epochs = 1.0}
entries = [{name = "good", plugin = "one-shot"}, {name = "bad", ENTRY}]
"""


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('plugin = "one-shto"', "No plugin named 'one-shto'. Did you mean 'one-shot'"),
        ('plugin = "nomod:Cls"', "its module must exist"),
        ('plugin = "one-shot", importance = "tailor"', "No importance estimator named 'tailor'"),
        ('plugin = "one-shot", config = {scop = "global"}', "Did you mean 'scope'"),
    ],
)
def test_a_comparison_finds_wrong_names_before_it_trains_anything(call: Call, entry: str, said: str) -> None:
    Path("p.toml").write_text(PROTOCOL.replace("ENTRY", entry))
    code, out, err = call("compare", "p.toml", "--output", "out")
    assert (code, out) == (2, "")
    assert "p.toml, entry 'bad': " in err
    assert said in err
    assert not Path("out").exists()
    assert call("compare", "p.toml", "--output", "out", "--list")[0] == 0


def test_a_comparison_does_not_write_into_a_run(call: Call) -> None:
    _prune(call, "runs/a")
    before = sorted(Path("runs/a").iterdir())
    Path("p.toml").write_text(PROTOCOL.replace("ENTRY", 'plugin = "random"'))
    code, _, said = call("compare", "p.toml", "--output", "runs/a")
    assert code == 2
    assert "folder runs/a holds a run" in said
    assert sorted(Path("runs/a").iterdir()) == before


@pytest.mark.parametrize("own", ["model.safetensors", "checkpoint/best.pth", "journal/day1.txt", "report.json"])
def test_files_that_are_called_like_those_of_a_run_are_somebodys_own_and_stay(own: str, tmp_path: Path) -> None:
    file = tmp_path / "project" / own
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunFolder(tmp_path / "project").check(overwrite=True)
    assert file.read_text() == "precious"
