"""A comparison: the protocol, its grid of cached cells, and the tables made of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunus.core.cli import run
from prunus.core.compare_forecast import seconds_left
from prunus.core.compare_plot import budgets_svg, macs_svg
from prunus.core.compare_protocol import Cell, Protocol, read_protocol
from prunus.core.compare_record import CellRecord, DenseRecord, Outcome, ResultsFolder
from prunus.core.compare_table import Results, as_csv, as_json, markdown
from prunus.core.errors import ConfigError, LoadError
from prunus.core.toml_text import to_toml

SIMULATED = '[adapters.simulated]\ntarget = "prunus.core.testing.simulated_session:open_session"\n'
BASE: dict[str, Any] = {
    "title": "Simulated",
    "adapter": "simulated",
    "model": "simulated/small",
    "data": "digits",
    "targets": ["macs=50%", "macs=25%"],
    "epochs": [0.0, 1.0],
    "seeds": [0, 1],
    "dense": {"epochs": 2.0},
    "entries": [
        {"name": "ours", "plugin": "one-shot"},
        {"name": "theirs", "rival": "somewhere.rivals:prune"},
    ],
}
RIVAL = """
from prunus.core.compare_record import Outcome


def prune(job):
    session = job.open_session(job.settings)
    if job.config.get("fails"):
        raise ValueError("the rival is out of order")
    facts = {"macs": job.limit, "params": 1, "training_macs": 0, "uses_dense": True}
    return Outcome(accuracy=0.5, holdout=0.25 * job.share, **facts)
"""


def protocol(**changes: Any) -> Protocol:
    return Protocol.model_validate({**BASE, **changes})


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "ours", "plugin": "one-shot", **changes}


# ---- the protocol -------------------------------------------------------------------------------------


def test_the_grid_is_every_combination_and_names_tell_cells_apart() -> None:
    names = [cell.name for cell in protocol().cells]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2
    assert names[0] == "ours/macs=50%/0ep/plain/seed0"


def test_an_entry_sits_out_what_it_does_not_name() -> None:
    chosen = protocol(
        teaching=["plain", "distilled"],
        entries=[
            entry(targets=["macs=25%"], epochs=[1.0], seeds=[1]),
            entry(name="taught", distilled={"distil": "always"}),
        ],
    )
    names = [cell.name for cell in chosen.cells if cell.entry.name == "ours"]
    assert names == ["ours/macs=25%/1ep/plain/seed1"]
    taught = [cell for cell in chosen.cells if cell.teaching == "distilled"]
    assert {cell.entry.name for cell in taught} == {"taught"}
    assert taught[0].config == {"distil": "always"}
    assert {cell.epochs for cell in taught} == {1.0}, "without a recovery there is nothing to be taught in"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["params=50%"]}, "holds MACs equal"),
        ({"targets": ["macs=150%"]}, "between 0% and 100%"),
        ({"seeds": [0, 0]}, "names 0 twice"),
        ({"seeds": []}, "seeds"),
        ({"entries": [entry(), entry()]}, "names 'ours' twice"),
        ({"entries": [{"name": "x"}]}, "either a plugin or a rival"),
        ({"entries": [entry(rival="a:b")]}, "either a plugin or a rival"),
        ({"entries": [entry(name="a/b")]}, "name"),
        ({"entries": [entry(settings={"seed": 1})]}, "the protocol's to set"),
        ({"entries": [entry(epochs=[7.0])]}, "are not the protocol's"),
        ({"entries": [entry(seeds=[7])]}, "seeds [7] are not the protocol's"),
        ({"training": {"lrr": 1}}, "Did you mean 'lr'"),
        ({"dense": {"epochs": 0}}, "dense.epochs"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_wrong_protocol_is_refused_before_anything_runs(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "protocol.toml"
    file.write_text(_toml({**BASE, **changes}))
    with pytest.raises(ConfigError) as raised:
        read_protocol(file)
    assert said in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_key_follows_from_what_is_compared_and_not_from_what_a_row_is_called() -> None:
    first = protocol()
    key = first.key(first.cells[0])
    renamed = protocol(title="Other", entries=[entry(name="another name", group="reference")])
    assert renamed.key(renamed.cells[0]) == key
    changes: list[dict[str, Any]] = [
        {"dense": {"epochs": 3.0}},
        {"train_limit": 100},
        {"training": {"lr": 0.3}},
        {"entries": [entry(config={"scope": "uniform"})]},
        {"entries": [entry(settings={"lr": 0.3})]},
        {"entries": [entry(compute=0.6)]},
        {"targets": ["macs=40%"]},
        {"seeds": [5]},
    ]
    keys = [key, *(other.key(other.cells[0]) for other in (protocol(**change) for change in changes))]
    assert len(set(keys)) == len(keys)


def test_cells_are_chosen_by_name_or_pattern_and_none_is_an_error() -> None:
    chosen = protocol()
    assert [c.name for c in chosen.select(["theirs/macs=25%/1ep/plain/seed1"])] == [
        "theirs/macs=25%/1ep/plain/seed1"
    ]
    assert len(chosen.select(["ours/*", "*/seed1"])) == 8 + 4
    assert chosen.select([]) == chosen.cells
    with pytest.raises(ConfigError, match="matches none of 16 cells; they are named like ours/macs=50%"):
        chosen.select(["nothing*"])


# ---- the table ----------------------------------------------------------------------------------------


def record(cell: Cell, accuracy: float, *, scratch: bool = False) -> CellRecord:
    dense = DenseRecord(
        seed=cell.seed, accuracy=0.9, holdout=0.9, macs=1000, training_macs=4e6, seconds=1, content="x"
    )
    share = 0.5 if cell.target == "macs=50%" else 0.25
    outcome = Outcome(
        accuracy=accuracy,
        holdout=accuracy,
        macs=1000 * share,
        params=10,
        training_macs=1e6,
        uses_dense=not scratch,
    )
    return CellRecord(
        cell=cell.name, key="k", entry=cell.entry.name, group=cell.entry.side, target=cell.target,
        epochs=cell.epochs, teaching=cell.teaching, seed=cell.seed, status="done", dense=dense, outcome=outcome,
        cpu_seconds=3.0, seconds=4.0,
    )  # fmt: skip


def results() -> Results:
    chosen = protocol(targets=["macs=25%", "macs=50%"], epochs=[1.0])
    figures = {
        ("ours", "macs=50%"): (0.88, 0.86), ("theirs", "macs=50%"): (0.85, 0.87),
        ("ours", "macs=25%"): (0.80, 0.82), ("theirs", "macs=25%"): (0.70, None),
    }  # fmt: skip
    records = []
    for cell in chosen.cells:
        accuracy = figures[cell.entry.name, cell.target][cell.seed]
        if accuracy is None:
            records.append(CellRecord.failure(cell, "k", "it broke"))
        else:
            records.append(record(cell, accuracy, scratch=cell.entry.name == "theirs"))
    return Results(chosen, tuple(records), "optimize compare p.toml --only CELL --rerun")


GOLDEN = """\
Dense accuracy: 90.00 90.00.

7 of 8 cells done.

## Without distillation, 1 epochs

|  | macs=50% | macs=25% |
| --- | --- | --- |
| ours | **87.00** (88.00 86.00) | **81.00** (80.00 82.00) |
| theirs | 86.00 (85.00 87.00) | 70.00 |
| *best method - best rival* | +1.00 (+3.0 -1.0): ours - theirs | +10.00: ours - theirs |

| total / time | macs=50% | macs=25% |
| --- | --- | --- |
| ours | 1.25 / 3 s | 1.25 / 3 s |
| theirs | 0.25 / 3 s | 0.25 / 3 s |

## Failed

- `theirs/macs=25%/1ep/plain/seed1`: it broke

## Any cell again

    optimize compare p.toml --only CELL --rerun
"""


def test_the_table_shows_means_all_seeds_margins_totals_and_failures() -> None:
    assert GOLDEN in markdown(results())


def test_json_and_csv_hold_every_record() -> None:
    data = json.loads(as_json(results()))
    assert len(data["cells"]) == 8
    margins = {row["target"]: row["differences"] for row in data["margins"]}
    assert margins["macs=50%"] == pytest.approx([0.03, -0.01])
    lines = as_csv(results()).splitlines()
    assert len(lines) == 9
    assert lines[1].startswith(
        "ours/macs=25%/1ep/plain/seed0,ours,method,macs=25%,1.0,plain,0,done,0.8,0.8,0.9,250.0"
    )


def test_a_table_of_several_states_of_the_source_says_so() -> None:
    whole = results()
    later = whole.records[0].model_copy(update={"versions": {"source": "f00"}})
    mixed = Results(whole.protocol, (later, *whole.records[1:]), "")
    assert "2 states of the source" in markdown(mixed)
    assert "states of the source" not in markdown(whole)


def test_margins_compare_cells_that_start_from_the_same_dense_network() -> None:
    def trained(uses_dense: bool, elsewhere: bool) -> Results:
        """Rivals that start from the dense network or not; ours of seed 1 from that of another machine, or not."""
        changed = []
        for r in results().records:
            if r.entry == "theirs" and r.outcome is not None:
                r = r.model_copy(update={"outcome": r.outcome.model_copy(update={"uses_dense": uses_dense})})
            if elsewhere and r.entry == "ours" and r.seed == 1 and r.dense is not None:
                r = r.model_copy(update={"dense": r.dense.model_copy(update={"accuracy": 0.91})})
            changed.append(r)
        return Results(results().protocol, tuple(changed), "")

    def seeds(of: Results) -> int:
        (margin,) = [m for m in json.loads(as_json(of))["margins"] if m["target"] == "macs=50%"]
        return len(margin["differences"])

    assert seeds(trained(uses_dense=True, elsewhere=False)) == 2
    assert seeds(trained(uses_dense=True, elsewhere=True)) == 1
    assert seeds(trained(uses_dense=False, elsewhere=True)) == 2
    assert "Seeds with several figures" in markdown(trained(uses_dense=True, elsewhere=True))
    assert "Seeds with several figures" not in markdown(results())


def test_the_best_of_few_seeds_is_not_the_winner() -> None:
    """A single lucky seed is neither bold nor the best rival."""
    whole = results()
    lucky = [r for r in whole.records if r.seed == 0 or r.entry == "ours"]
    lucky = [r.model_copy(update={"outcome": r.outcome.model_copy(update={"accuracy": 0.99})})
             if r.entry == "theirs" and r.outcome else r for r in lucky]  # fmt: skip
    text = markdown(Results(whole.protocol, tuple(lucky), ""))
    assert "**99.00**" not in text
    assert "| theirs | 99.00 | 99.00 |" in text


def test_the_plots_are_the_same_for_the_same_results_and_name_every_entry() -> None:
    pytest.importorskip("matplotlib")
    for draw, along in ((macs_svg, "% of dense"), (budgets_svg, "recovery, epochs")):
        first = draw(results())
        assert first == draw(results())
        assert "ours" in first and "theirs" in first and along in first


def test_the_axes_are_marked_at_the_targets_and_budgets_that_were_asked_for() -> None:
    """The cells' own MACs are a little below."""
    pytest.importorskip("matplotlib")
    whole = results()
    below = [r.model_copy(update={"outcome": r.outcome.model_copy(update={"macs": 0.99 * r.outcome.macs})})
             for r in whole.records if r.outcome]  # fmt: skip
    found = Results(whole.protocol, tuple(below), "")
    assert _marks(macs_svg(found)) == ["25", "50"]
    assert _marks(budgets_svg(found)) == ["1", "1"]


def _marks(svg: str) -> list[str]:
    """What stands below the x axes."""
    return re.findall(r'<g id="xtick_\d+">.*?<text [^>]*>([^<]*)</text>', svg, re.DOTALL)


def test_budgets_are_drawn_where_several_train(bench: Callable[..., int]) -> None:
    assert bench("--only", "ours/macs=50%/*/plain/seed0", epochs=[0.0, 1.0]) == 0
    assert not Path("out/budgets.svg").exists()
    assert bench("--only", "ours/macs=50%/*/plain/seed0", epochs=[0.0, 1.0, 2.0]) == 0
    assert _marks(Path("out/budgets.svg").read_text()) == ["1", "2"]


def test_the_time_left_goes_by_the_finished_cells_most_like_those_that_are_missing() -> None:
    chosen = protocol()  # ours and theirs, two targets, two budgets, two seeds

    def taken(name: str, seconds: float) -> CellRecord:
        (cell,) = chosen.select([name])
        return record(cell, 0.8, scratch=False).model_copy(update={"seconds": seconds})

    first = [taken("ours/macs=50%/1ep/plain/seed0", 10.0), taken("ours/macs=25%/1ep/plain/seed0", 30.0)]
    same_but_for_the_seed = chosen.select(["ours/*/1ep/plain/seed1"])
    assert seconds_left(same_but_for_the_seed, first) == 10 + 30
    another_entry = chosen.select(["theirs/macs=50%/1ep/plain/seed0"])
    assert seconds_left(another_entry, first) == 20  # the mean of that budget
    assert seconds_left(chosen.select(["theirs/macs=50%/0ep/plain/seed0"]), first) == 20  # of everything
    assert seconds_left(another_entry, []) is None


# ---- the grid -----------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`optimize compare` on the simulated adapter, in a folder with a rival."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "rivals.py").write_text(RIVAL)
    (tmp_path / "registry.toml").write_text(SIMULATED)

    def call(*words: str, **changes: Any) -> int:
        Path("p.toml").write_text(_toml({**BASE, "import_from": ".", **changes}))
        return run(["compare", "p.toml", "--output", "out", "--registry", "registry.toml", *words])

    return call


def test_cells_are_run_once_and_a_stopped_grid_goes_on(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", "ours/*/0ep/plain/seed0", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["cells"], facts["done"], facts["failed"]) == (2, 2, [])
    cells = sorted(Path("out/cells").glob("*.json"))
    before = [path.read_text() for path in cells]
    assert bench("--only", "*/0ep/plain/seed0", "--jobs", "2") == 0
    captured = capsys.readouterr()
    assert "2 of 4 cells are there already; about " in captured.err
    assert "[4/4]" in captured.err
    assert captured.err.count(" left\n") == 2  # at the start and after the first; nothing is left after the last
    assert [path.read_text() for path in cells] == before
    assert captured.out.count("| ours | ") == captured.out.count("| theirs | ") == 2
    assert {path.name for path in Path("out").iterdir()} >= {"table.md", "table.json", "table.csv", "plot.svg"}
    assert len(list(Path("out/dense").iterdir())) == 1
    assert not list(Path("out/work").iterdir())


def test_a_cell_run_again_has_the_same_figures(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ours/macs=50%/1ep/plain/seed1"
    assert bench("--only", name) == 0
    first = _outcomes()
    assert bench("--list", "--only", name) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("done")
    assert run(line.split()[2:]) == 0  # the command that the list names, without `done optimize`
    assert _outcomes() == first


def test_a_failing_cell_is_recorded_with_its_reason_and_tried_again(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [{"name": "theirs", "rival": "somewhere.rivals:prune", "config": {"fails": True}}]
    only = ("--only", "*/macs=50%/0ep/plain/seed0")
    assert bench(*only, entries=[*broken, entry()]) == 1
    captured = capsys.readouterr()
    assert "out of order" in captured.err
    assert "again: optimize compare p.toml" in captured.err
    assert "- `theirs/macs=50%/0ep/plain/seed0`: ValueError: the rival is out of order" in captured.out
    assert "| ours |" in captured.out
    assert bench(*only, entries=[*broken, entry()]) == 1
    assert "1 of 2 cells are there already" in capsys.readouterr().err


def test_a_rival_that_is_not_there_is_named(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    missing = [{"name": "theirs", "rival": "somewhere.nothing:prune"}]
    assert bench("--only", "*/macs=50%/0ep/plain/seed0", entries=missing) == 1
    assert "rival 'somewhere.nothing:prune' cannot be imported" in capsys.readouterr().err


def test_a_damaged_record_and_a_changed_dense_model_are_found(bench: Callable[..., int]) -> None:
    name = "ours/macs=50%/0ep/plain/seed0"
    assert bench("--only", name) == 0
    chosen, folder = read_protocol(Path("p.toml")), ResultsFolder(Path("out"))
    plan = folder.dense_folder(chosen.dense_key(0)) / "plan.json"
    plan.write_text(plan.read_text() + " ")
    with pytest.raises(LoadError, match="is not the one that was trained"):
        folder.read_dense(chosen.dense_key(0))
    cell = chosen.select([name])[0]
    folder.cell_file(chosen.key(cell)).write_text("{")
    with pytest.raises(LoadError, match="is damaged"):
        folder.read(cell, chosen.key(cell))
    assert bench("--only", name) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done_and_records_no_failure(
    number: signal.Signals, bench: Callable[..., int]
) -> None:
    """Ctrl-C goes to the whole group of processes, SIGTERM to the one that was started."""
    bench("--list")  # writes the protocol
    words = ["compare", "p.toml", "--output", "out", "--registry", "registry.toml", "--only", "ours/*"]
    # what runs in the background of a script ignores Ctrl-C, and so would this
    text = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    text += "from prunus.core.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", text, *words], stderr=subprocess.PIPE, start_new_session=True)
    limit = time.monotonic() + 120
    while len(list(Path("out/cells").glob("*.json"))) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"cells are kept, the same command goes on" in said
    assert {outcome["status"] for outcome in _records()} == {"done"}
    assert run(words) == 0
    assert len(_records()) == 8


def _records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path("out/cells").glob("*.json"))]


def _outcomes() -> list[Any]:
    return [found["outcome"] for found in _records()]


def _toml(values: dict[str, Any]) -> str:
    """TOML of a protocol; entries become inline tables."""
    plain = {key: value for key, value in values.items() if key != "entries"}
    rows = ", ".join(_inline(row) for row in values["entries"])
    return f"entries = [{rows}]\n{to_toml(plain, {})}"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
