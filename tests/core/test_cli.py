"""The command line from the outside: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prunus.core.cli import run
from prunus.core.run_lock import RunLock

SIMULATED = '[adapters.simulated]\ntarget = "prunus.core.testing.simulated_session:open_session"\n'


@dataclass(frozen=True)
class Done:
    """One command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)  # type: ignore[no-any-return]


Optimize = Callable[..., Done]


@pytest.fixture
def optimize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Optimize:
    """Run a command on the simulated adapter, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "registry.toml").write_text(SIMULATED)

    def call(command: str, *words: str) -> Done:
        first = command.split()
        adapter = (
            []
            if first[0] in ("plugins", "report", "evaluate") or "--resume" in words
            else ["--adapter", "simulated"]
        )
        registry = [] if first[0] == "report" else ["--registry", "registry.toml"]
        code = run([*first, *words, *adapter, *registry])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def test_prune_meets_its_target_and_prints_exactly_one_json_object(optimize: Optimize) -> None:
    done = optimize("prune", "--plugin", "one-shot", "--output", "runs/a", "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    facts = done.json
    assert facts["target_met"] is True
    assert (facts["run"], facts["plugin"], facts["targets"]) == ("runs/a", "one-shot", ["macs=50%"])
    for size in (facts["dense"], facts["pruned"]):
        assert all(isinstance(size[key], int) for key in ("macs", "params", "bytes"))
        assert 0 <= size["accuracy"] <= 1
    assert facts["pruned"]["macs"] <= facts["dense"]["macs"] / 2
    assert facts["verification"]["kind"] == "exact"
    assert facts["verification"]["max_error"] <= 1e-6 * facts["verification"]["scale"] + 1e-9
    assert facts["seconds"] > 0


def test_prune_prints_a_table_for_people_and_its_progress_on_stderr(optimize: Optimize) -> None:
    done = optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    assert done.code == 0
    for words in (
        "before",
        "after",
        "Widths by stage",
        "Verified:",
        "Run folder: runs/a",
        "optimize evaluate runs/a",
    ):
        assert words in done.out
    assert "removed down to" in done.err
    assert "removed down to" not in done.out


def test_a_run_folder_holds_what_the_design_names(optimize: Optimize, tmp_path: Path) -> None:
    optimize("prune", "--plugin", "iterative", "--output", "runs/a", "--seed", "3")
    folder = tmp_path / "runs" / "a"
    names = {path.name for path in folder.iterdir()}
    assert {
        "run.toml",
        "plan.json",
        "report.json",
        "report.html",
        "metrics.jsonl",
        "journal",
        "checkpoint",
    } <= names
    assert len(list((folder / "checkpoint").iterdir())) == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert "seed = 3" in (folder / "run.toml").read_text()


def test_run_toml_repeats_the_run(optimize: Optimize, tmp_path: Path) -> None:
    first = optimize("prune", "--plugin", "iterative", "--set", "rounds=2", "--output", "runs/a", "--json").json
    again = optimize("prune", "--config", "runs/a/run.toml", "--output", "runs/b", "--json").json
    assert first["pruned"] == again["pruned"]
    plans = [json.loads((tmp_path / "runs" / name / "plan.json").read_text()) for name in "ab"]
    assert plans[0] == plans[1]


def test_options_override_the_config_file(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('plugin = "one-shot"\ntargets = ["macs=50%"]\nseed = 1\n')
    done = optimize("prune", "--config", "run.toml", "--target", "params=70%", "--output", "runs/a", "--json")
    assert done.json["targets"] == ["params=70%"]
    assert "seed = 1" in (tmp_path / "runs" / "a" / "run.toml").read_text()


def test_data_none_prunes_without_any_data(optimize: Optimize) -> None:
    facts = optimize("prune", "--plugin", "one-shot", "--data", "none", "--json").json
    assert facts["dense"]["accuracy"] is None
    assert facts["pruned"]["accuracy"] is None
    assert facts["target_met"]


WRONG: dict[str, tuple[list[str], int, str]] = {
    "plugin": (["--plugin", "one-shto"], 2, "No plugin named 'one-shto'. Did you mean 'one-shot'"),
    "model": (["--plugin", "one-shot", "--model", "timm/nothing"], 4, "there is no model 'timm/nothing'"),
    "target of 0%": (["--target", "macs=0%"], 2, "a share must lie between 0% and 100%"),
    "target of 150%": (["--target", "macs=150%"], 2, "a share must lie between 0% and 100%"),
    "unreachable": (["--plugin", "one-shot", "--target", "macs=0.1%"], 3, "the smallest reachable is"),
    "metric": (["--target", "speed=2"], 2, "write one of macs=50%"),
    "setting": (["--plugin", "one-shot", "--set", "scop=global"], 2, "Did you mean 'scope'"),
    "value": (["--plugin", "one-shot", "--set", "scope=here"], 2, "'global' or 'uniform'"),
    "assignment": (["--plugin", "one-shot", "--set", "scope"], 2, "write --set KEY=VALUE"),
    "option": (["--plug", "one-shot"], 2, "No such option"),
    "number": (["--epochs", "many"], 2, "a valid number"),
    "learning rate": (["--lr", "-1"], 2, "lr: Input should be greater than 0"),
    "config file": (["--config", "none.toml"], 2, "none.toml cannot be read"),
    "registry file": (["--registry", "none.toml"], 2, "none.toml cannot be read"),
    "importance": (["--plugin", "gsm-anneal", "--importance", "taylor"], 2, "takes no --importance"),
    "data": (["--plugin", "one-shot", "--importance", "taylor", "--data", "none"], 2, "needs data"),
    "resume": (["--resume", "nowhere"], 1, "nowhere holds no run"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_clear_line_with_the_right_exit_code(
    mistake: str, optimize: Optimize, tmp_path: Path
) -> None:
    words, code, message = WRONG[mistake]
    done = optimize("prune", *words)
    assert (done.code, done.out) == (code, "")
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("optimize: ")
    assert message in last
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_debug_shows_the_traceback(optimize: Optimize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_DEBUG", "")
    done = optimize("prune", "--plugin", "none-such", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err


def test_an_existing_run_is_refused_unless_overwritten(optimize: Optimize) -> None:
    words = ["--plugin", "one-shot", "--output", "runs/a"]
    assert optimize("prune", *words).code == 0
    refused = optimize("prune", *words)
    assert refused.code == 2
    assert "--resume runs/a" in refused.err
    assert "--overwrite" in refused.err
    assert optimize("prune", *words, "--overwrite", "--target", "macs=60%").code == 0


def test_an_overwrite_that_fails_early_leaves_the_old_run(optimize: Optimize, tmp_path: Path) -> None:
    words = ["--plugin", "one-shot", "--output", "runs/a"]
    optimize("prune", *words)
    before = (tmp_path / "runs" / "a" / "plan.json").read_text()
    assert optimize("prune", *words, "--overwrite", "--target", "macs=0.1%").code == 3
    assert (tmp_path / "runs" / "a" / "plan.json").read_text() == before


def test_a_folder_with_other_things_in_it_is_never_touched(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        done = optimize("prune", "--plugin", "one-shot", "--output", "mine", *extra)
        assert done.code == 2
        assert "holds no run" in done.err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_process_left_half_written_is_swept_away(optimize: Optimize, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / ".run.toml.4711.tmp").write_text("plug")
    assert optimize("prune", "--plugin", "one-shot", "--output", "runs/a").code == 0
    (folder / "journal" / ".000002.json.4711.tmp").write_text("{")
    (folder / "notes.tmp").write_text("the user's own")
    assert optimize("prune", "--resume", "runs/a").code == 0
    assert [path.name for path in folder.rglob("*.tmp")] == ["notes.tmp"]


def test_two_default_folders_do_not_collide(optimize: Optimize) -> None:
    first, second = (optimize("prune", "--plugin", "one-shot", "--json").json["run"] for _ in range(2))
    assert first != second


def test_a_resumed_finished_run_says_the_same_again(optimize: Optimize) -> None:
    first = optimize("prune", "--plugin", "iterative", "--output", "runs/a", "--json").json
    again = optimize("prune", "--resume", "runs/a", "--json").json
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_what_a_run_follows_from_cannot_be_changed_on_resume(optimize: Optimize) -> None:
    optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    done = optimize("prune", "--resume", "runs/a", "--target", "macs=30%")
    assert done.code == 2
    assert "--target cannot be changed" in done.err


@pytest.mark.parametrize("words", [["--overwrite"], ["--config", "other.toml"], ["--output", "runs/b"]])
def test_what_a_resumed_run_would_not_heed_is_refused(words: list[str], optimize: Optimize) -> None:
    assert optimize("prune", "--plugin", "one-shot", "--output", "runs/a").code == 0
    done = optimize("prune", "--resume", "runs/a", *words)
    assert done.code == 2
    assert f"{words[0]} cannot be changed by --resume" in done.err


def test_a_run_folder_that_names_code_needs_trust(optimize: Optimize, tmp_path: Path) -> None:
    optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    path = tmp_path / "runs" / "a" / "run.toml"
    path.write_text(path.read_text().replace('model = "simulated/small"', 'model = "python:os:system"'))
    for command in (["prune", "--resume", "runs/a"], ["evaluate", "runs/a"]):
        done = optimize(*command)
        assert done.code == 2
        assert "--trust" in done.err


def test_a_run_of_other_settings_does_not_continue(optimize: Optimize, tmp_path: Path) -> None:
    optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    path = tmp_path / "runs" / "a" / "run.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    done = optimize("prune", "--resume", "runs/a")
    assert done.code == 1
    assert "belongs to another model" in done.err


def test_a_folder_in_use_is_refused(optimize: Optimize) -> None:
    optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    with RunLock(Path("runs/a")):
        done = optimize("prune", "--resume", "runs/a")
    assert done.code == 1
    assert f"in use by another process (pid {os.getpid()})" in done.err


def test_evaluate_loads_the_finished_run_and_finds_its_accuracy(optimize: Optimize) -> None:
    pruned = optimize("prune", "--plugin", "one-shot", "--epochs", "0", "--output", "runs/a", "--json").json
    facts = optimize("evaluate", "runs/a", "--json").json
    assert (facts["run"], facts["macs"]) == ("runs/a", pruned["pruned"]["macs"])
    assert 0 <= facts["accuracy"] <= 1


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_folder_without_a_finished_run_cannot_be_loaded(command: str, optimize: Optimize) -> None:
    done = optimize(command, "nowhere")
    assert done.code == 4
    assert "holds no finished run" in done.err


def test_report_rebuilds_the_page(optimize: Optimize, tmp_path: Path) -> None:
    made = optimize("prune", "--plugin", "one-shot", "--output", "runs/a", "--json")
    page = tmp_path / "runs" / "a" / "report.html"
    before = page.read_text()
    page.unlink()
    assert optimize("report", "runs/a", "--json").json == made.json
    assert page.read_text() == before


def test_inspect_lists_groups_with_what_scripts_read(optimize: Optimize) -> None:
    facts = optimize("inspect simulated/small", "--json", "--slices").json
    assert (facts["model"], facts["input_size"]) == ("simulated/small", [8, 1, 1])
    assert 0 < facts["reachable"]["macs"] < 1
    group = facts["groups"][0]
    assert (group["name"], group["units"], group["multiple_of"], group["locked"]) == ("h0", 24, 1, None)
    assert {s["role"] for s in group["slices"]} == {"writes", "reads", "scales"}
    assert all(len(s["unit_of"]) == 24 for s in group["slices"])


def test_inspect_explains_itself_to_people(optimize: Optimize) -> None:
    done = optimize("inspect simulated/small")
    assert done.code == 0
    assert "2 channel groups" in done.out
    assert "Reachable:" in done.out


def test_plugins_are_listed_with_their_origin_and_what_is_broken(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "registry.toml").write_text("[plugins.bad]\ntarget = 'no_module_here:X'\n")
    rows = {row["name"]: row for row in optimize("plugins list", "--json").json["entries"]}
    assert rows["one-shot"]["broken"] is None
    assert rows["one-shot"]["source"] == "built-in"
    assert "its module must exist" in rows["bad"]["broken"]
    assert "broken: Plugin 'bad'" in optimize("plugins list").out


def test_a_plugin_shows_its_settings_and_schema(optimize: Optimize) -> None:
    shown = optimize("plugins show one-shot").out
    assert "scope" in shown
    assert "global | uniform" in shown
    schema = optimize("plugins show one-shot", "--schema").json
    assert schema["additionalProperties"] is False
    assert optimize("plugins show magnitude", "--json").json["kind"] == "importance"


def test_a_plugin_is_checked_rule_by_rule(optimize: Optimize) -> None:
    done = optimize("plugins check magnitude")
    assert done.code == 0
    assert "5 of 5 rules kept" in done.out
    assert optimize("plugins check", "magnitud").code == 2


def test_the_schema_of_run_toml_can_be_printed(optimize: Optimize) -> None:
    assert "targets" in optimize("prune", "--schema").json["properties"]


MAIN = "import sys; from prunus.core.cli import main; main()"


def _start(folder: Path, *words: str, before: str = "") -> subprocess.Popen[str]:
    (folder / "registry.toml").write_text(SIMULATED)
    command = [sys.executable, "-c", before + MAIN, "prune", "--registry", "registry.toml", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_NEW = ("--adapter", "simulated", "--model", "simulated/wide", "--plugin", "iterative", "--epochs", "40", "--json")


def _wait_for_entries(folder: Path, count: int) -> None:
    limit = time.monotonic() + 60
    while len(list((folder / "runs" / "a" / "journal").glob("0*.json"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_or_interrupted_resumes_to_the_same_plan(
    number: signal.Signals, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    reference = _start(whole, *_NEW, "--output", "runs/a")
    assert reference.communicate(timeout=120) and reference.returncode == 0
    started = _start(broken, *_NEW, "--output", "runs/a")
    _wait_for_entries(broken, 4)
    os.kill(started.pid, number)
    _, err = started.communicate(timeout=60)
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "stopping when the step in flight is done" in err
        assert "optimize prune --resume runs/a" in err
    resumed = _start(broken, "--resume", "runs/a", "--json")
    out, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    assert json.loads(out)["target_met"]
    plans = [(folder / "runs" / "a" / "plan.json").read_text() for folder in (whole, broken)]
    assert plans[0] == plans[1]
    sizes = [
        json.loads((folder / "runs" / "a" / "report.json").read_text())["pruned"] for folder in (whole, broken)
    ]
    assert sizes[0] == sizes[1]


def test_a_disk_that_is_full_ends_in_one_line_and_the_run_resumes(tmp_path: Path) -> None:
    """The limit on file sizes lets the journal begin and stops the first checkpoint."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    full = _start(tmp_path, *_NEW, "--output", "runs/a", before=limit)
    out, err = full.communicate(timeout=120)
    assert (full.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert "what was done is safe" in err
    assert not list((tmp_path / "runs" / "a").rglob("*.tmp"))
    resumed = _start(tmp_path, "--resume", "runs/a", "--json")
    out, _ = resumed.communicate(timeout=120)
    assert json.loads(out)["target_met"]


def test_a_module_in_the_current_folder_can_be_named_and_hides_no_installed_package(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "plugins" / "magnitude.py"
    (tmp_path / "my_module.py").write_text(source.read_text("utf-8"))
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    script = tmp_path / "bin" / "optimize"  # where a console script lies: not in the current folder
    script.parent.mkdir()
    script.write_text("from prunus.core.cli import main\nmain()\n")
    command = [sys.executable, str(script), "plugins", "check", "my_module:Magnitude"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_method_that_refuses_leaves_the_run_that_was_to_be_overwritten(
    optimize: Optimize, tmp_path: Path
) -> None:
    optimize("prune", "--plugin", "one-shot", "--output", "runs/a")
    before = (tmp_path / "runs" / "a" / "plan.json").read_text()
    done = optimize("prune", "--plugin", "joint-search", "--epochs", "0", "--output", "runs/a", "--overwrite")
    assert done.code == 2
    assert "joint-search trains from scratch and needs epochs" in done.err
    assert (tmp_path / "runs" / "a" / "plan.json").read_text() == before


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["prune"], ["[gsm-anneal]", "[off]", "[the method's cosine]", "[digits]", "[0.05]", "[runs/...]"]),
        (["compare"], ["[runs/compare-NAME]"]),
        (["export"], ["[RUN/model.onnx, RUN/hub...]"]),
        (["latency"], ["[the run's]"]),
        (["plugins", "new"], ["[prunus-NAME]"]),
    ],
)
def test_help_shows_the_defaults_in_brackets(
    command: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert [text for text in shown if text not in out] == []
