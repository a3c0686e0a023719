"""`kill -9` at random moments of real runs: resumed, they end in an undisturbed run's plan and weights."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads CPU times from /proc")

# Every run is a process of its own, forked from one that has imported everything and computed nothing.
SERVER = """
import json, os, sys
import sklearn.datasets, timm.data
import prunus.adapters.pytorch.session, prunus.core.display, prunus.core.pruning
import prunus.plugins.bayes_reparam, prunus.plugins.gsm_anneal, prunus.plugins.joint_search
import prunus.plugins.iterative
from prunus.core.cli import run
for line in sys.stdin:
    words = json.loads(line)
    child = os.fork()
    if not child:
        said = os.open(words.pop(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        os._exit(run(words))
    print(child, flush=True)
    sys.stdin.readline()  # until then the child keeps its number, dead or alive
    _, status, used = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
COMMON = ("prune", "--model", "prunus/resnet8", "--data", "digits", "--train-limit", "200", "--batch-size", "50")
TRAINING = ("--dense-epochs", "2", "--threads", "1", "--target", "macs=50%")
METHODS = {
    "gsm-anneal": ("--epochs", "4"),
    "gsm-anneal branches": ("--epochs", "4", "--set", "expansion=branches", "--set", "sensitivity=yes"),
    "bayes-reparam": ("--epochs", "4"),
    "joint-search": ("--epochs", "6", "--set", "evaluations=6"),
    "iterative": ("--epochs", "4", "--depth"),
}
MOMENTS = [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]


class Runs:
    """Starts runs, waits for them, kills them."""

    def __init__(self, said: Path) -> None:
        self.said = said
        self.cpu_seconds = 0.0
        """Of the last run that ended."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(
        self, *words: str, kill_after: float | None = None, kill_when: Callable[[], bool] | None = None
    ) -> int:
        """The exit code, or minus the signal that ended it; what it said is in the file `said`.

        `kill_after` counts seconds of CPU time: on a busy machine, too, it is about the same moment of the run.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([*words, str(self.said)]) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        if kill_after is not None:
            while not _has_used(child, kill_after):
                time.sleep(0.004)
            os.kill(child, signal.SIGKILL)
        if kill_when is not None:
            while not (kill_when() or _has_used(child, math.inf)):
                time.sleep(0.004)
            os.kill(child, signal.SIGKILL)
        self._server.stdin.write("\n")
        self._server.stdin.flush()
        code, used = self._server.stdout.readline().split()
        self.cpu_seconds = float(used)
        return int(code)

    def close(self) -> None:
        self._server.communicate()


def _has_used(process: int, seconds: float) -> bool:
    """True once the process has used so much CPU time, or has ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "Z" or (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = Runs(tmp_path_factory.mktemp("said") / "said.txt")
    yield server
    server.close()


def _begin(method: str, folder: Path) -> tuple[str, ...]:
    plugin = method.partition(" ")[0]
    return (*COMMON, *TRAINING, *METHODS[method], "--plugin", plugin, "--output", str(folder), "--json")


def _outcome(folder: Path) -> tuple[str, bytes, dict[str, float]]:
    report = json.loads((folder / "report.json").read_text())
    return (folder / "plan.json").read_text(), (folder / "model.safetensors").read_bytes(), report["pruned"]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_ends_in_the_plan_and_weights_of_an_undisturbed_one(
    method: str, moments: int, runs: Runs, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert runs(*_begin(method, whole)) == 0, runs.said.read_text()
    duration = runs.cpu_seconds
    rng = random.Random(method)
    for number in range(moments):
        code, tries = 0, 0
        while code == 0:
            # A run that ended before its moment was faster than those before it (what else runs on the processor
            # changes its speed): it shows what a whole run takes now, and a moment within that is drawn.
            tries += 1
            folder = tmp_path / f"{number}-{tries}"
            moment = duration * (number + rng.random()) / moments
            code = runs(*_begin(method, folder), kill_after=moment)
            duration = min(duration, runs.cpu_seconds) if code == 0 else duration
            assert tries < 10, f"{tries} runs of about {duration:.2f} s ended before they could be killed"
        assert code == -signal.SIGKILL, runs.said.read_text()
        begun = (folder / "run.toml").exists()
        again = ("prune", "--resume", str(folder), "--json") if begun else _begin(method, folder)
        assert runs(*again) == 0, f"killed after {moment:.2f} s: {runs.said.read_text()}"
        assert _outcome(folder) == _outcome(whole), f"killed after {moment:.2f} s of {duration:.2f} s"


def test_a_run_that_leaves_everything_to_the_defaults_is_resumed_to_the_same_end(
    runs: Runs, tmp_path: Path
) -> None:
    """Nothing is said of epochs: the data's own are what the run begins with and what is read back."""
    words = (*COMMON, "--plugin", "one-shot", "--threads", "1", "--json", "--output")
    assert runs(*words, str(tmp_path / "whole")) == 0, runs.said.read_text()
    for dead, reached in enumerate(("000000.json", "000003.json")):
        folder = tmp_path / f"{dead}"
        journal = folder / "journal" / reached
        assert runs(*words, str(folder), kill_when=journal.exists) == -signal.SIGKILL, runs.said.read_text()
        assert runs("prune", "--resume", str(folder), "--json") == 0, runs.said.read_text()
        assert _outcome(folder) == _outcome(tmp_path / "whole")


def test_a_truncated_checkpoint_falls_back_to_the_one_before_says_so_and_ends_in_the_same_weights(
    runs: Runs, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert runs(*_begin("gsm-anneal", whole)) == 0

    def checkpoints() -> list[Path]:
        found = (broken / "checkpoint").glob("[!.]*")
        return sorted(path for path in found if path.suffix != ".tmp")

    command = _begin("gsm-anneal", broken)
    assert runs(*command, kill_when=lambda: len(checkpoints()) > 1) == -signal.SIGKILL
    newest = checkpoints()[-1]
    weights = next(newest.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert runs("prune", "--resume", str(broken), "--json") == 0
    said = " ".join(runs.said.read_text().split())
    assert f"checkpoint {newest.name} cannot be used" in said
    assert _outcome(broken) == _outcome(whole)
