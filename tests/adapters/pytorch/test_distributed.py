"""Several processes do what one does: gloo on the CPU, real processes, started as torchrun starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from numpy.linalg import norm
from safetensors.numpy import load_file

pytest.importorskip("accelerate")

# Processes are forked from one that has imported everything and computed nothing: a start takes no time.
SERVER = """
import json, os, sys
import accelerate, sklearn.datasets, timm.data, torch.distributed
import prunus.adapters.pytorch.session, prunus.core.display, prunus.core.pruning
import prunus.plugins.bayes_reparam, prunus.plugins.gsm_anneal, prunus.plugins.joint_search
from prunus.core.cli import run
for line in sys.stdin:
    job = json.loads(line)
    children = []
    for rank, said in enumerate(job["said"]):
        child = os.fork()
        if not child:
            os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            if "script" in job:
                exec(job["script"])
                os._exit(0)
            os._exit(run(job["words"]))
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
TINY = ("prune", "--model", "prunus/resnet8", "--data", "digits", "--train-limit", "160", "--batch-size", "32")
TINY += ("--dense-epochs", "2", "--threads", "1", "--target", "macs=50%")
TINY += ("--lr", "0.02")  # a hasty training makes much of a rounding
METHODS = {
    # with seed 0 a bias that is next to nothing (6e-3) differs by 1e-5, which is much of it
    "gsm-anneal": ("--epochs", "2", "--seed", "1"),
    "gsm-anneal branches": ("--epochs", "4", "--set", "expansion=branches"),
    "bayes-reparam": ("--epochs", "3"),
    "joint-search": ("--epochs", "4", "--set", "evaluations=4"),
}


class Jobs:
    """Starts jobs of several processes and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[Path] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, processes: int, **job: object) -> list[int]:
        """The processes' ids, first to last."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        environment["LOCAL_WORLD_SIZE"] = str(processes)
        self.said = [self.folder / f"said.{rank}" for rank in range(processes)]
        order = {"environment": environment, "said": [str(path) for path in self.said], **job}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return list(json.loads(self._server.stdout.readline()))

    def codes(self) -> list[int]:
        """Exit codes, once all have ended."""
        assert self._server.stdout is not None
        return list(json.loads(self._server.stdout.readline()))

    def run(self, processes: int, *words: str) -> list[int]:
        self.start(processes, words=words)
        return self.codes()

    def texts(self) -> list[str]:
        return [path.read_text("utf-8") for path in self.said]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    started = Jobs(tmp_path_factory.mktemp("said"))
    yield started
    started.close()


def plan_of(folder: Path) -> object:
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    del plan["provenance"]
    return plan


def largest_difference(one: Path, other: Path) -> float:
    """Of any tensor, by its norm."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float(norm(first[name] - second[name]) / norm(first[name])) for name in first)


@pytest.mark.parametrize(
    "method",
    ["gsm-anneal", "gsm-anneal branches", *(pytest.param(n, marks=pytest.mark.slow) for n in list(METHODS)[2:])],
)
def test_two_processes_end_in_the_plan_and_the_weights_of_one(method: str, jobs: Jobs, tmp_path: Path) -> None:
    words = (*TINY, "--plugin", method.partition(" ")[0], *METHODS[method], "--output")
    assert jobs.run(1, *words, str(tmp_path / "one")) == [0]
    assert jobs.run(2, *words, str(tmp_path / "two")) == [0, 0], jobs.texts()
    assert plan_of(tmp_path / "one") == plan_of(tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-3
    notes = json.loads((tmp_path / "two" / "report.json").read_text("utf-8"))["notes"]
    assert any("2 processes share every batch" in note for note in notes)


def test_two_processes_mix_and_augment_as_one(jobs: Jobs, tmp_path: Path) -> None:
    words = (
        *TINY,
        "--plugin",
        "one-shot",
        "--dense-epochs",
        "1",
        "--epochs",
        "1",
        "--mixup",
        "0.2",
        "--cutmix",
        "1",
    )
    words += ("--smoothing", "0.1", "--aa", "rand-m5-n2", "--reprob", "0.2", "--sched", "cosine", "--opt", "lamb")
    words += ("--lr", "1e-3", "--output")
    assert jobs.run(1, *words, str(tmp_path / "one")) == [0]
    assert jobs.run(2, *words, str(tmp_path / "two")) == [0, 0], jobs.texts()
    assert plan_of(tmp_path / "one") == plan_of(tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-3


def test_a_killed_process_ends_the_job_which_goes_on_with_another_number_of_them(
    jobs: Jobs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*TINY, "--plugin", "gsm-anneal", *METHODS["gsm-anneal"])
    pids = jobs.start(2, words=(*words, "--output", str(run)))
    while not list((run / "checkpoint").glob("00000*")):
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    assert jobs.codes() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 30
    said = " ".join(jobs.texts()[0].split())
    assert "another process of this job has ended" in said
    assert "--resume" in said
    assert jobs.run(4, "prune", "--resume", str(run)) == [0] * 4, jobs.texts()
    assert jobs.run(1, *words, "--output", str(tmp_path / "whole")) == [0]
    assert plan_of(run) == plan_of(tmp_path / "whole")


RESTORED = """
from pathlib import Path
from prunus.adapters.pytorch.distributed import plan_digest
from prunus.adapters.pytorch.session import open_session
from prunus.core.directives import Evaluate, Remove
from prunus.core.errors import JournalError
from prunus.core.settings import make_settings
session, folder = open_session(make_settings({
    "model": "prunus/resnet8", "data": "digits", "train_limit": 160, "batch_size": 32, "threads": 1,
})), Path(FOLDER)
adapter = session.adapter
if session._processes.place.first:
    for name in ("empty", "dense", "pruned"):
        (folder / name).mkdir(parents=True)
    plans = {"dense": plan_digest(adapter)}
    adapter.checkpoint(folder / "dense")
    name, group = next((n, g) for n, g in adapter.graph.groups.items() if not g.locked)
    adapter.remove(Remove({name: list(range(group.units // 2))}))
    plans["pruned"] = plan_digest(adapter)
    adapter.checkpoint(folder / "pruned")
    for name, plan in plans.items():
        try:
            adapter.restore(folder / "empty")
        except JournalError:
            print("the one before")
        adapter.restore(folder / name)
        assert plan_digest(adapter) == plan
        print(adapter.evaluate(Evaluate()).samples)
    session.dismiss()
else:
    session.follow()
print("ends with", adapter.forward_macs)
"""


def test_all_processes_are_brought_to_a_checkpoint_of_another_plan_than_theirs(jobs: Jobs, tmp_path: Path) -> None:
    jobs.start(2, script=RESTORED.replace("FOLDER", repr(str(tmp_path))))
    assert jobs.codes() == [0, 0], jobs.texts()
    first, second = jobs.texts()
    assert first.count("the one before") == 2
    assert first.partition("ends with ")[2] == second.partition("ends with ")[2] != ""


DIFFERENT_PLANS = """
import os
from prunus.adapters.pytorch.processes import SeveralProcesses
from prunus.core.errors import ProcessError
processes = SeveralProcesses("cpu")
try:
    processes.check_same("plan", "0123" if processes.place.first else "4567")
except ProcessError as error:
    print(error)
"""


def test_processes_with_different_plans_stop_and_name_both(jobs: Jobs) -> None:
    jobs.start(2, script=DIFFERENT_PLANS)
    assert jobs.codes() == [0, 0]
    for said in jobs.texts():
        assert "process 1 has another plan than process 0: 4567 instead of 0123" in said


ANOTHER_REMOVAL = """
from prunus.adapters.pytorch.session import open_session
from prunus.core.directives import Evaluate, Remove
from prunus.core.errors import ProcessError
from prunus.core.settings import make_settings
session = open_session(make_settings({
    "model": "prunus/resnet8", "data": "digits", "train_limit": 160, "batch_size": 32, "threads": 1,
}))
adapter = session.adapter
try:
    if session._processes.place.first:
        name, group = next((n, g) for n, g in adapter.graph.groups.items() if not g.locked)
        print(adapter.evaluate(Evaluate()).samples)
        adapter.remove(Remove({name: list(range(group.units // 2))}))
        print(adapter.evaluate(Evaluate()).samples)
        # as a faulty network card might do it: the others' model is another from now on
        adapter.shrinking.remove({name: list(range(group.units // 4))}, verified=False, seed=0)
        print("then", adapter.evaluate(Evaluate()))
    else:
        session.follow()
except ProcessError as error:
    print("stopped:", error)
"""


def test_plans_are_compared_at_every_directive(jobs: Jobs) -> None:
    jobs.start(2, script=ANOTHER_REMOVAL)
    assert jobs.codes() == [0, 0], jobs.texts()
    first, second = jobs.texts()
    assert "then" not in first
    stops = {said.partition("stopped: ")[2].strip() for said in (first, second)}
    assert len(stops) == 1
    assert re.search(
        r"process 1 has another plan than process 0: ([0-9a-f]{16,}) instead of (?!\1)[0-9a-f]{16,}", stops.pop()
    )


GATED = """
import copy, numpy as np, torch
from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.processes import ALONE
from prunus.adapters.pytorch.session import open_session
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.core.directives import Train
from prunus.core.settings import make_settings
session = open_session(make_settings({
    "model": MODEL, "data": "digits", "train_limit": 160, "batch_size": 32, "threads": 1,
}))
batches, processes, graph = session._bundle.train, session._processes, session.adapter.graph
rng = np.random.default_rng(0)
gates = {n: rng.uniform(0, 1, g.units).round(1) for n, g in graph.groups.items() if not g.locked and g.gateable}
settings = TrainingSettings(lr=0.02, clip=5.0, accumulate=ACCUMULATE)
ends = []
for share, who in ((batches, ALONE), (processes.share(batches), processes)):
    model = copy.deepcopy(session.adapter.model)
    job = Job(Train(epochs=2), 0, 1.0, make_hook=lambda: Gating(model, graph, gates))
    trained = Trainer(settings, share, 0, who).train(model, settings.make_optimizer(model), job)
    ends.append((trained, model.state_dict()))
(alone, expected), (together, found) = ends
assert abs(alone.loss - together.loss) < 1e-4 and alone.macs == together.macs, (alone, together)
for name, value in expected.items():
    assert torch.allclose(value, found[name], rtol=1e-3, atol=1e-4), (name, (value - found[name]).abs().max())
print("equal")
"""


@pytest.mark.parametrize(
    ("model", "accumulate"),
    [("prunus/resnet8", 1), ("timm/test_vit", 2)],
    ids=["batch norm", "layer norm, in parts"],
)
def test_gates_are_trained_through_alike_by_one_process_and_by_two(
    model: str, accumulate: int, jobs: Jobs
) -> None:
    jobs.start(2, script=GATED.replace("MODEL", repr(model)).replace("ACCUMULATE", str(accumulate)))
    assert jobs.codes() == [0, 0], jobs.texts()
    assert all("equal" in said for said in jobs.texts())


SHARED_NORM = """
import torch
from timm.layers import BatchNormAct2d
from prunus.adapters.pytorch.processes import SeveralProcesses
processes = SeveralProcesses("cpu")
torch.manual_seed(0)
whole = torch.randn(6, 3, 4, 4, dtype=torch.float64) * 3 + 100
target = torch.randn_like(whole)
alone, shared = (BatchNormAct2d(3).double().train() for _ in range(2))
expected = whole.clone().requires_grad_()
((alone(expected) - target) ** 2).mean().backward()
mine = slice(processes.place.rank, None, 2)
x = whole[mine].clone().requires_grad_()
with processes.parallel(shared) as network, processes.norms():
    ((network(x) - target[mine]) ** 2).mean().backward()
assert torch.allclose(x.grad / 2, expected.grad[mine], rtol=1e-9), "inputs"
for name, parameter in alone.named_parameters():
    assert torch.allclose(parameter.grad, dict(shared.named_parameters())[name].grad, rtol=1e-9), name
for name, buffer in alone.named_buffers():
    assert torch.allclose(buffer, dict(shared.named_buffers())[name], rtol=1e-12), name
print("equal")
"""


def test_a_shared_batch_norm_is_that_of_the_whole_batch_forwards_and_backwards(jobs: Jobs) -> None:
    jobs.start(2, script=SHARED_NORM)
    assert jobs.codes() == [0, 0], jobs.texts()
    assert all("equal" in said for said in jobs.texts())


def test_a_batch_that_cannot_be_shared_equally_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    codes = jobs.run(3, *TINY, *METHODS["gsm-anneal"], "--output", str(tmp_path / "run"))
    assert codes[0] in (1, 2)
    assert any("--batch-size 32" in said and "a multiple of 3" in said for said in jobs.texts())


def test_commands_that_are_not_shared_are_answered_once(jobs: Jobs) -> None:
    assert jobs.run(2, "plugins", "list") == [0, 0]
    first, second = jobs.texts()
    assert "gsm-anneal" in first and second == ""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_the_command(launcher: str, tmp_path: Path) -> None:
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
    }[launcher]
    words = (*TINY, *METHODS["gsm-anneal"], "--output", str(tmp_path / "run"))
    command = [sys.executable, *start, "-m", "prunus.core", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
