"""The journal gives back what was written, and names the file that was damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from dataclasses import field, make_dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.core.digest import digest
from prunus.core.directives import Changed, Evaluated, Measure, Remove, Train, Trained
from prunus.core.errors import JournalError, PlanError, PluginError
from prunus.core.graph_record import GraphRecord, rebuild_graph, record_graph
from prunus.core.journal import SCHEMA, Journal
from prunus.core.observations import RecordingReader, rebuild, record
from prunus.core.run_lock import RunLock
from prunus.core.signals import Signal
from prunus.core.testing.graphs import mlp_graph, residual_graph
from prunus.core.testing.simulation import SimulatedAdapter

BELONGS = "a" * 64


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with one entry of each kind of observation."""
    folder = tmp_path_factory.mktemp("written") / "journal"
    adapter = SimulatedAdapter(samples=64, dense_epochs=1)
    journal = Journal.create(folder, "1.0", BELONGS)
    journal.append("Note", "0" * 64, None, 0.0)
    journal.append("Train", "1" * 64, Trained(0.5, None, 1e9, 7, least=0.25), 1.5)
    journal.append("Evaluate", "2" * 64, Evaluated(0.25, 0.875, 64), 0.1)
    reader = RecordingReader(adapter.measure(Measure(frozenset({Signal.WEIGHT, Signal.ACTIVATION_MEAN}))), "p")
    reader.read(Signal.WEIGHT, "fc0.weight")
    reader.read(Signal.ACTIVATION_MEAN, "fc1.weight")
    assert reader.has(Signal.WEIGHT, "fc1.weight")
    assert not reader.has(Signal.WEIGHT, "nothing")
    journal.append("Measure", "3" * 64, reader, 0.2)
    journal.append("Remove", "4" * 64, adapter.remove(Remove({"h0": range(12)})), 0.3)
    return folder


def test_what_was_written_is_read(written: Path) -> None:
    nothing, trained, evaluated, signals, changed = Journal.open(written, "1.0", BELONGS).entries
    assert nothing.observation is None
    assert trained.observation == Trained(0.5, None, 1e9, 7, least=0.25)
    assert evaluated.observation == Evaluated(0.25, 0.875, 64)
    adapter = SimulatedAdapter(samples=64, dense_epochs=1)
    reader = signals.observation
    np.testing.assert_array_equal(reader.read(Signal.WEIGHT, "fc0.weight"), adapter.weights["fc0.weight"])  # type: ignore[union-attr]
    assert reader.has(Signal.WEIGHT, "fc1.weight")  # type: ignore[union-attr]
    assert not reader.has(Signal.WEIGHT, "nothing")  # type: ignore[union-attr]
    expected = adapter.remove(Remove({"h0": range(12)}))
    assert isinstance(changed.observation, Changed)
    assert changed.observation.plan == expected.plan
    assert changed.observation.graph.fingerprint == expected.graph.fingerprint


def test_reading_what_was_not_recorded_blames_the_method(written: Path) -> None:
    reader = Journal.open(written, "1.0", BELONGS).entries[3].observation
    with pytest.raises(JournalError, match="not a deterministic function"):
        reader.read(Signal.ACTIVATION_MEAN, "fc0.weight")  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="there is no weight"):
        reader.read(Signal.WEIGHT, "nothing")  # type: ignore[union-attr]


@pytest.mark.parametrize("graph", [mlp_graph([4, 8, 6, 2]), residual_graph(12, [8, 6])])
def test_a_graph_survives_its_record(graph: object) -> None:
    record, indices = record_graph(graph)  # type: ignore[arg-type]
    again = rebuild_graph(GraphRecord.model_validate_json(record.model_dump_json()), indices)
    assert again.fingerprint == graph.fingerprint  # type: ignore[attr-defined]
    assert again.tensors == graph.tensors  # type: ignore[attr-defined]
    assert again.blocks == graph.blocks  # type: ignore[attr-defined]


def test_a_gap_names_the_missing_entry(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    (folder / "000002.json").unlink()
    with pytest.raises(JournalError, match=r"000002\.json is missing"):
        Journal.open(folder, "1.0", BELONGS)


def test_missing_arrays_are_named(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    (folder / "000003.safetensors").unlink()
    with pytest.raises(JournalError, match=r"000003\.safetensors is missing"):
        Journal.open(folder, "1.0", BELONGS)


def test_an_entry_that_was_edited_is_found(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    entry = json.loads((folder / "000002.json").read_text())
    entry["entry"]["observation"]["accuracy"] = 0.99
    (folder / "000002.json").write_text(json.dumps(entry))
    with pytest.raises(JournalError, match="checksum does not match"):
        Journal.open(folder, "1.0", BELONGS)


def test_another_schema_is_refused_with_both_versions(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    head = {"schema": SCHEMA + 1, "version": "7.5", "belongs_to": BELONGS, "something": "new"}
    (folder / "head.json").write_text(json.dumps(head))
    with pytest.raises(JournalError, match=r"schema 2 by prunus 7\.5.*prunus 1\.0, which reads schema 1"):
        Journal.open(folder, "1.0", BELONGS)


def test_truncating_removes_the_last_entries_and_their_arrays(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    Journal.open(folder, "1.0", BELONGS).truncate(3)
    assert sorted(p.name for p in folder.iterdir()) == ["000000.json", "000001.json", "000002.json", "head.json"]
    assert len(Journal.open(folder, "1.0", BELONGS).entries) == 3


def test_a_deeply_nested_entry_is_a_typed_error(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "journal")
    (folder / "000001.json").write_text("[" * 200_000)
    with pytest.raises(JournalError, match=r"000001\.json is damaged"):
        Journal.open(folder, "1.0", BELONGS)


def test_a_closed_reader_blames_the_plugin() -> None:
    adapter = SimulatedAdapter(samples=64, dense_epochs=0)
    reader = RecordingReader(adapter.measure(Measure(frozenset({Signal.WEIGHT}))), "late")
    reader.close()
    with pytest.raises(PluginError, match="'late'"):
        reader.read(Signal.WEIGHT, "fc0.weight")


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_PLAIN, _PLAIN)
def test_equal_content_has_equal_digests_and_different_content_different_ones(a: object, b: object) -> None:
    def exact(value: object) -> str:  # 1, 1.0 and True are equal to Python and different to a digest
        return json.dumps(value, sort_keys=True)

    assert digest(a) == digest(json.loads(exact(a)))
    if exact(a) != exact(b):
        assert digest(a) != digest(b)


def test_a_digest_sees_every_unit_and_ignores_the_order_of_groups() -> None:
    one = Remove({"a": [0, 1], "b": [2]})
    assert digest(one) == digest(Remove({"b": [2], "a": [0, 1]}))
    assert digest(one) != digest(Remove({"a": [0, 2], "b": [2]}))
    gates = np.linspace(0, 1, 5)
    moved = gates.copy()
    moved[3] = np.nextafter(moved[3], 1)
    assert digest(Train(1.0, gates={"a": gates})) != digest(Train(1.0, gates={"a": moved}))


def test_a_field_that_a_later_version_adds_leaves_the_digests_of_what_does_without_it() -> None:
    before = make_dataclass("Train", [("epochs", float)])
    added = [("repeats", int, 1), ("parts", tuple, ()), ("extra", dict, field(default_factory=dict))]
    after = make_dataclass("Train", [("epochs", float), *added])
    assert digest(after(2.0)) == digest(before(2.0))
    changed = [after(2.0, repeats=2), after(2.0, parts=(1,)), after(2.0, extra={"a": 1}), after(2.0, repeats=True)]
    assert len({digest(one) for one in [after(2.0), *changed]}) == 5


def test_a_digest_tells_apart_which_field_holds_a_value() -> None:
    pair = make_dataclass("Pair", [("a", object, None), ("b", object, None)])
    different = [pair(), pair(1), pair(b=1), pair("b", 1), pair(pair(b=1)), pair(pair(), 1)]
    assert len({digest(one) for one in different}) == len(different)


def test_what_is_no_plain_data_has_no_digest() -> None:
    with pytest.raises(TypeError, match="object is not plain data"):
        digest({"x": object()})


HOLDER = """
import sys
from pathlib import Path
from prunus.core.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_a_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"
        with (
            pytest.raises(JournalError, match=rf"in use by another process \(pid {holder.pid}\)"),
            RunLock(tmp_path),
        ):
            pass
        holder.communicate(timeout=20)  # the end of its input lets it go
    with RunLock(tmp_path):
        pass


class Matrices:
    """Activation covariances by name; implements `core.signals.SignalReader`."""

    signals = frozenset({Signal.ACTIVATION_COVARIANCE})

    def __init__(self, **arrays: np.ndarray) -> None:
        self._arrays = arrays

    def read(self, signal: Signal, name: str) -> np.ndarray:
        return self._arrays[name]

    def has(self, signal: Signal, name: str) -> bool:
        return name in self._arrays


def test_what_was_measured_is_given_up_once_it_is_written(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal", "1.0", BELONGS)
    source = Matrices(c=np.eye(100))
    reader = RecordingReader(source, "p")
    measured, array = weakref.ref(source), weakref.ref(reader.read(Signal.ACTIVATION_COVARIANCE, "c"))
    del source
    reader.close()
    assert measured() is None and array() is not None
    journal.append("Measure", "0" * 64, reader, 0.0)
    assert array() is None and len(journal.entries) == 1


def test_a_long_journal_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    journal, side, length = Journal.create(tmp_path / "journal", "1.0", BELONGS), 500, 8
    for k in range(length):
        reader = RecordingReader(Matrices(c=np.random.default_rng(k).normal(size=(side, side))), "p")
        reader.read(Signal.ACTIVATION_COVARIANCE, "c")
        journal.append("Measure", str(k) * 64, reader, 0.0)
    tracemalloc.start()
    try:
        found = Journal.open(tmp_path / "journal", "1.0", BELONGS)
        sums = [entry.observation.read(Signal.ACTIVATION_COVARIANCE, "c").sum() for entry in found.entries]  # type: ignore[union-attr]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(sums)) == length
    assert peak < 4 * 8 * side**2  # bytes of a file, of its array, and of the one before


def test_an_entry_that_is_damaged_after_the_journal_was_opened_is_refused(written: Path) -> None:
    entry = Journal.open(written, "1.0", BELONGS).entries[3]
    (written / "000003.safetensors").write_bytes(b"no longer")
    with pytest.raises(JournalError, match="checksum does not match"):
        _ = entry.observation


def test_symmetric_and_single_precision_arrays_take_half_the_room_and_come_back_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    square = rng.normal(size=(100, 100))
    single = square.astype(np.float32).astype(np.float64)
    given = {"symmetric": (square + square.T) / 2, "other": square, "single": single}
    given |= {"small": np.eye(3), "flat": square[0], "huge": np.array([1e300, np.inf])}
    journal = Journal.create(tmp_path / "journal", "1.0", BELONGS)
    sizes = []
    for name in given:
        reader = RecordingReader(Matrices(**given), "p")
        reader.read(Signal.ACTIVATION_COVARIANCE, name)
        journal.append("Measure", "0" * 64, reader, 0.0)
        sizes.append((journal.folder / f"{len(sizes):06d}.safetensors").stat().st_size)
    for name, entry in zip(given, Journal.open(journal.folder, "1.0", BELONGS).entries, strict=True):
        found = entry.observation.read(Signal.ACTIVATION_COVARIANCE, name)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found, given[name])
        assert found.dtype == np.float64
    assert sizes[0] < 0.52 * sizes[1]
    assert sizes[2] < 0.52 * sizes[1]


@pytest.mark.parametrize("shape", [(), (4, 3, 5), (1,)])
def test_arrays_come_back_in_the_memory_order_in_which_they_were_read(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    other = np.array(np.random.default_rng(0).normal(size=shape), order="F")  # as of a channels_last model
    reader = RecordingReader(Matrices(c=other), "p")
    read = reader.read(Signal.ACTIVATION_COVARIANCE, "c")
    journal = Journal.create(tmp_path / "journal", "1.0", BELONGS)
    journal.append("Measure", "0" * 64, reader, 0.0)
    (entry,) = Journal.open(journal.folder, "1.0", BELONGS).entries
    found = entry.observation.read(Signal.ACTIVATION_COVARIANCE, "c")  # type: ignore[union-attr]
    np.testing.assert_array_equal(found, other)
    assert found.shape == read.shape == shape and found.strides == read.strides


@pytest.mark.parametrize("side", [99, 101, 10**6])
def test_a_triangle_of_another_size_is_refused(side: int) -> None:
    reader = RecordingReader(Matrices(c=np.eye(100)), "p")
    reader.read(Signal.ACTIVATION_COVARIANCE, "c")
    observed, arrays = record(reader)
    text = observed.model_dump_json().replace('"side":100', f'"side":{side}')
    with pytest.raises(ValueError, match="cannot be an array of shape"):
        rebuild(type(observed).model_validate_json(text), arrays)
