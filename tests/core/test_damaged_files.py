"""Whatever happened to a run folder's files: a typed error within a second, and nothing written."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.core.cli import run
from prunus.core.errors import PrunusError
from prunus.core.finished import image_size, read_report
from prunus.core.journal import Journal, read_head
from prunus.core.plugin_settings import configure
from prunus.core.run_folder import RunFolder
from prunus.plugins.iterative import Iterative

ROUNDS = [150, pytest.param(10_000, marks=pytest.mark.slow)]
PIECES = [
    b"\x00",
    b"\xff" * 8,
    b"..",
    b"[" * 5000,
    b'"',
    b"9" * 400,
    b"1e999",
    b"NaN",
    b"null",
    b"-1",
    b"{}",
    b"\n",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    registry = folder / "registry.toml"
    registry.write_text('[adapters.simulated]\ntarget = "prunus.core.testing.simulated_session:open_session"\n')
    words = ["prune", "--plugin", "iterative", "--adapter", "simulated", "--registry", str(registry)]
    assert run([*words, "--output", str(folder / "run")]) == 0
    return folder / "run"


def _mutations(raw: bytes, rounds: int) -> Iterator[bytes]:
    """`raw` with bytes changed, cut, doubled, or with pieces that parsers stumble over put in."""
    rng = random.Random(0)
    for _ in range(rounds):
        mutated = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 20])):
            at = rng.randrange(len(mutated) + 1)
            match rng.randrange(5):
                case 0 if at < len(mutated):
                    mutated[at] = rng.randrange(256)
                case 1:
                    del mutated[at:]
                case 2:
                    del mutated[at : at + rng.randrange(40)]
                case 3:
                    mutated[at:at] = mutated[: rng.randrange(200)]
                case _:
                    mutated[at:at] = rng.choice(PIECES)
        yield bytes(mutated)


def _tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", ["run.toml", "report.json", "journal/head.json", "journal/000003.json", "arrays"])
def test_a_mutated_file_gives_a_typed_error_within_a_second_and_writes_nothing(
    name: str, rounds: int, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    head = read_head(folder / "journal")
    arrays = sorted((folder / "journal").glob("*.safetensors"))
    path = arrays[0] if name == "arrays" else folder / name
    tree = _tree(tmp_path)
    for mutated in _mutations(path.read_bytes(), rounds):
        path.write_bytes(mutated)
        started = time.process_time()
        try:
            if name == "run.toml":
                settings = RunFolder(folder).read_settings(trust=False)
                configure(Iterative.Config, "iterative", settings.config)
            elif name == "report.json":
                image_size(read_report(folder))
            else:
                Journal.open(folder / "journal", head.version, head.belongs_to)
        except PrunusError as error:
            assert str(error)
        assert time.process_time() - started < 1.0
    assert _tree(tmp_path) == tree
