"""What a session decides by itself, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prunus.adapters.pytorch.session import open_session
from prunus.core.allocation import uniform_keep
from prunus.core.budget import Budget, Target
from prunus.core.directives import Remove
from prunus.core.errors import ConfigError, LoadError
from prunus.core.plan import ModelSource
from prunus.core.settings import RunSettings

SMALL = {"model": "prunus/resnet8", "data": "digits", "train_limit": 200, "batch_size": 32}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_batches_are_computed_by_one_thread_and_the_user_is_told() -> None:
    session = open_session(RunSettings(**SMALL))
    assert torch.get_num_threads() == 1
    assert any("one thread" in note for note in session.describe().notes)


def test_the_number_of_threads_that_the_user_gives_is_taken() -> None:
    session = open_session(RunSettings(**SMALL, threads=2))
    assert torch.get_num_threads() == 2
    assert session.describe().notes == ()


def test_a_run_without_data_leaves_the_threads_alone() -> None:
    open_session(RunSettings(model="prunus/resnet8", data="none"))
    assert torch.get_num_threads() == 2


def test_a_plan_can_name_no_other_model_than_the_one_its_user_named() -> None:
    session = open_session(RunSettings(model="prunus/resnet8", data="none"))
    with pytest.raises(LoadError, match=r"of the model 'python:os:getcwd', not of 'prunus/resnet8'"):
        session.adapter.origin.build(ModelSource(name="python:os:getcwd"))


def test_a_plan_of_the_same_model_with_other_arguments_is_refused_by_those() -> None:
    session = open_session(RunSettings(model="prunus/resnet8", data="none"))
    own = session.source
    with pytest.raises(LoadError, match=r"of the model 'prunus/resnet8' with other arguments: zz=3, not none$"):
        session.adapter.origin.build(own.model_copy(update={"kwargs": {**own.kwargs, "zz": 3}}))


def test_more_parts_than_images_of_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a batch of 32 cannot be computed in 33 parts.* at most 32$") as caught:
        open_session(RunSettings(**SMALL, accumulate=33))
    assert caught.value.key == "accumulate"


@pytest.mark.parametrize("epochs", [None, 0.0, 1.5])
def test_refits_know_whether_training_follows(epochs: float | None) -> None:
    given = {} if epochs is None else {"epochs": epochs}
    assert open_session(RunSettings(**SMALL, **given)).adapter.settings.trains == (epochs != 0)


def test_a_device_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:7' cannot be used"):
        open_session(RunSettings(model="prunus/resnet8", data="none", device="cuda:7"))


def test_a_teacher_without_weights_for_the_classes_is_refused() -> None:
    with pytest.raises(LoadError):
        open_session(RunSettings(**SMALL, teachers=("prunus/resnet14=missing.safetensors",)))


class _Listener:
    """A watcher that keeps what it is told, and stops at a layer."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self._stop_at = stop_at

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        self.steps.append((label, done, total))
        if done == self._stop_at:
            raise KeyboardInterrupt

    def boundary(self) -> None: ...

    def notice(self, text: str) -> None: ...


def _refitting(listener: _Listener) -> None:
    adapter = open_session(RunSettings(**SMALL)).adapter
    graph = adapter.graph
    budget = Budget.resolve([Target.parse("macs=50%")], graph.cost())
    keep = uniform_keep(graph, budget, {name: np.ones(group.units) for name, group in graph.prunable.items()})
    adapter.watch(listener)
    adapter.remove(Remove(keep, refit="sequential", images=64))


def test_a_refit_says_after_every_layer_how_far_it_is() -> None:
    listener = _Listener()
    _refitting(listener)
    total = len(listener.steps)
    assert total >= 8
    assert listener.steps == [("refit", k + 1, total) for k in range(total)]


def test_a_refit_stops_at_the_layer_where_it_is_asked_to() -> None:
    listener = _Listener(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        _refitting(listener)
    assert len(listener.steps) == 3
