"""One model and its data, opened from settings: what the command line reaches of PyTorch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from prunus.adapters.pytorch.adapter import AdapterSettings, PyTorchAdapter
from prunus.adapters.pytorch.artifact import PLAN_FILE, assemble, load, read_plan, save_artifact
from prunus.adapters.pytorch.augmentation import Augmentation
from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.catalog import BuiltModel, build, construct
from prunus.adapters.pytorch.copies import in_eval
from prunus.adapters.pytorch.datasets import DataSource, LoadOptions, load_data, open_data
from prunus.adapters.pytorch.defaults import filled
from prunus.adapters.pytorch.distributed import LeadingAdapter, follow
from prunus.adapters.pytorch.export import EXPORTS
from prunus.adapters.pytorch.hub import push_folder, write_folder
from prunus.adapters.pytorch.latency import measure_pair
from prunus.adapters.pytorch.latency_table import latency, latency_table
from prunus.adapters.pytorch.mixing import Mixing
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.processes import ALONE, Processes, SeveralProcesses, join
from prunus.adapters.pytorch.run_state import Remembered
from prunus.adapters.pytorch.schedule import Schedule
from prunus.adapters.pytorch.shrinking_model import Origin
from prunus.adapters.pytorch.trackers import open_trackers
from prunus.adapters.pytorch.user_data import GIVEN
from prunus.adapters.pytorch.weights import refuse_sparse, weights_digest
from prunus.core.adapter import Description
from prunus.core.cost import CostTerm
from prunus.core.digest import digest
from prunus.core.directives import Evaluated
from prunus.core.errors import ConfigError, LoadError
from prunus.core.export import ExportFormat, ExportReport
from prunus.core.graph import ChannelGraph
from prunus.core.latency import LatencyComparison, LatencyTable
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.settings import RunSettings
from prunus.core.tracking import Tracker

_SHARED_WORK = 2e9
"""MACs of a batch from which on several threads pay."""
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "prunus")


class PyTorchSession:
    """Implements `core.adapter.Session`."""

    def __init__(
        self,
        settings: RunSettings,
        built: BuiltModel,
        bundle: DataBundle | None,
        construct_original: Callable[[ModelSource], nn.Module],
        processes: Processes = ALONE,
    ) -> None:
        """`settings` must be filled; `construct_original` makes a fresh original, weights of no matter."""
        self.settings, self._processes = settings, processes
        self._device = processes.device if isinstance(processes, SeveralProcesses) else _device(settings.device)
        self._built, self._bundle, self._construct = built, bundle, construct_original
        refuse_sparse(built.module)
        origin = Origin(built.source, built.input, construct_original, _provenance(settings))
        if isinstance(processes, SeveralProcesses) and processes.place.first:
            self.adapter: PyTorchAdapter = LeadingAdapter(
                built.module, origin, self._adapter_settings(), bundle, processes
            )
        else:
            self.adapter = PyTorchAdapter(built.module, origin, self._adapter_settings(), bundle, processes)
        self._threads = self._limit_threads()
        self.teachers = tuple(self._remember_teacher(i, name) for i, name in enumerate(settings.teachers))

    def _limit_threads(self) -> int | None:
        """As asked; one where a step is so small that threads wait for each other more than they work."""
        threads, macs = self.settings.threads, self.adapter.forward_macs * (self.settings.batch_size or 1)
        if threads is None and self._device == "cpu" and self._bundle is not None and macs < _SHARED_WORK:
            threads = 1
        if threads is not None:
            torch.set_num_threads(threads)
            threadpool_limits(threads, user_api="blas")
        return threads

    def _adapter_settings(self) -> AdapterSettings:
        settings = self.settings
        assert settings.lr is not None and settings.weight_decay is not None
        mixing = Mixing(settings.mixup, settings.cutmix, settings.smoothing, self._built.classes or 0)
        if self._bundle is not None:
            mixing.check(settings.batch_size or 1, self._processes.place.count)
            _refuse_empty_parts(settings, self._processes.place.count)
            _refuse_mixing(settings, self._built)
        training = TrainingSettings(
            lr=settings.lr,
            optimizer=settings.opt,
            weight_decay=settings.weight_decay,
            device=self._device,
            clip=settings.clip_grad,
            amp=("fp16" if settings.amp_dtype == "float16" else "bf16") if settings.amp else "off",
            channels_last=settings.channels_last,
            accumulate=settings.accumulate,
            compile=settings.torchcompile,
            average=settings.model_ema_decay if settings.model_ema else None,
            mixing=mixing,
            schedule=Schedule(settings.sched, settings.decay_epochs, settings.decay_rate),
        )
        training.check_optimizer()
        return AdapterSettings(
            training,
            settings.seed,
            settings.min_share,
            settings.multiple_of,
            settings.verify,
            trains=bool(settings.epochs),
        )

    def _remember_teacher(self, index: int, name: str) -> str:
        """A finished run's folder, or `MODEL=CHECKPOINT`, or a model whose published weights are used."""
        if self._bundle is None or not self.has_labels:
            raise ConfigError(f"--teacher needs labelled data, but --data is {self.settings.data}", key="teacher")
        if (Path(name) / PLAN_FILE).exists():
            model, source = load(name, trust=self.settings.trust), read_plan(Path(name)).model
        else:
            model_name, _, checkpoint = name.partition("=")
            try:
                built = build(
                    model_name,
                    classes=self._bundle.classes,
                    in_chans=self._bundle.in_chans,
                    pretrained=not checkpoint,
                    checkpoint=Path(checkpoint) if checkpoint else None,
                    img_size=self.settings.img_size,
                )
            except LoadError as error:
                raise LoadError(
                    f"teacher {name!r}: {error} (a teacher is the folder of a finished run, MODEL=CHECKPOINT, or "
                    "a model with published weights)"
                ) from None
            if not built.has_weights:
                raise LoadError(f"teacher {name!r} has no weights for the data's {self._bundle.classes} classes")
            model, source = built.module, built.source
        example = self._built.input.example(1)
        try:
            macs, classes = _forward_macs(model, example), output_classes(model, example)
        except Exception as error:  # a model may fail on a size in any way it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            size = "x".join(map(str, self._built.input.size))
            raise LoadError(f"teacher {name!r} cannot take images of {size} ({reason})") from None
        label = f"user-{index}"
        if classes != self._bundle.classes:
            raise LoadError(
                f"teacher {name!r} answers with {classes} classes, the data has {self._bundle.classes}"
            )
        plan = PruningPlan(model=source)
        self.adapter.snapshots[label] = Remembered(in_eval(model.to(self._device)), plan, macs, foreign=True)
        return label

    @property
    def graph(self) -> ChannelGraph:
        return self.adapter.original_graph

    @property
    def source(self) -> ModelSource:
        return self._built.source

    @property
    def has_data(self) -> bool:
        return self._bundle is not None

    @property
    def has_labels(self) -> bool:
        return self._bundle is not None and self._bundle.classes > 0

    @property
    def classes(self) -> int | None:
        return self._bundle.classes if self._bundle is not None and self.has_labels else self._built.classes

    @property
    def dense_needs_training(self) -> bool:
        return self.has_labels and not self._built.has_weights

    def describe(self) -> Description:
        images = {}
        if self._bundle is not None:
            splits = ("train", "holdout", "calibration", "test") if self.has_labels else ("calibration",)
            images = {name: getattr(self._bundle, name).samples for name in splits}
        assert self.settings.model is not None
        notes = [*self._built.notes, *(self._bundle.broken.notes if self._bundle is not None else ())]
        notes.extend(self.adapter.shrinking.trace.notices)
        if self.settings.threads is None and self._threads == 1:
            notes.append("computing with one thread: batches are too small to share (--threads)")
        if not self._processes.place.alone:
            notes.append(f"{self._processes.place.count} processes share every batch")
        return Description(
            model=self.settings.model,
            input_size=self._built.input.size,
            classes=self.classes,
            data=self.settings.data,
            images=images,
            device=self._device,
            versions=_versions(),
            notes=tuple(notes),
        )

    def test(self) -> Evaluated | None:
        if not self.has_labels:
            return None
        return self.adapter.test()

    def content(self) -> str | None:
        """Of weights that were given; of data sets without a name the number of images."""
        images = self.describe().images if self.settings.data == GIVEN else None
        weights = weights_digest(self.adapter.model) if self._built.has_weights else None
        return digest({"images": images, "weights": weights}) if images or weights else None

    def trackers(self, run: str, folder: Path) -> list[Tracker]:
        return open_trackers(self.settings.track, run, folder, self.settings.model_dump(mode="json"))

    def follow(self) -> None:
        assert isinstance(self._processes, SeveralProcesses)
        follow(self.adapter, self._processes)

    def dismiss(self) -> None:
        if isinstance(self.adapter, LeadingAdapter):
            self.adapter.dismiss()

    def save(self, folder: Path, plan: PruningPlan, report: Mapping[str, Any]) -> None:
        model = self.adapter.model.to("cpu")
        save_artifact(folder, model, plan, self._construct, self._built.input.example(2))
        model.to(self._device)

    def load(self, folder: Path) -> None:
        self.adapter.model = assemble(folder, self._construct).to(self._device)

    def export(
        self, folder: Path, path: Path, form: ExportFormat, input_size: tuple[int, int, int]
    ) -> ExportReport:
        real = None if self._bundle is None else next(iter(self._bundle.test))[0][:8]
        if isinstance(real, torch.Tensor) and real.dim() == 4 and real.shape[1] != input_size[0]:
            raise ConfigError(
                f"{self.settings.data} has images of {real.shape[1]} channels, "
                f"the run's model takes {input_size[0]}",
                key="data",
            )
        spec, trust = replace(self._built.input, size=input_size), self.settings.trust
        if form == "hub":
            return write_folder(folder, path, spec, real=real, trust=trust)
        images = None if real is None else (real,)
        return EXPORTS[form](load(folder, trust=trust), spec.example(2), path, real=images)

    def publish(self, folder: Path, repository: str) -> str:
        return push_folder(folder, repository)

    def compare_latency(
        self,
        folder: Path,
        input_size: tuple[int, int, int],
        *,
        batch: int,
        threads: int | None,
        repeats: int,
        dtype: str,
    ) -> LatencyComparison:
        pruned = load(folder, trust=self.settings.trust).to(self._device)
        dense = construct(read_plan(folder).model, allow_python=self.settings.trust).to(self._device)
        example = replace(self._built.input, size=input_size).example(batch)
        on_device = tuple(x.to(self._device) if isinstance(x, torch.Tensor) else x for x in example)
        return measure_pair(dense, pruned, on_device, repeats=repeats, threads=threads, dtype=dtype)

    def time_layers(self) -> LatencyTable:
        if self._device != "cpu":
            raise ConfigError(f"latency targets are measured on the CPU; --device is {self._device}", key="device")
        adapter = self.adapter
        trace, example = adapter.shrinking.trace, self._built.input.example(1)
        return latency_table(
            trace, self.graph, adapter.model, example, adapter.shrinking.narrowed, threads=self.settings.threads
        )

    def add_terms(self, terms: Iterable[CostTerm]) -> None:
        self.adapter.shrinking.add_terms(terms)

    def time_at(self, counts: Mapping[str, int] | None) -> float:
        model = self.adapter.model
        if counts is not None:
            model = self.adapter.shrinking.narrowed({name: range(count) for name, count in counts.items()})
        return latency(model, self._built.input.example(1), self.settings.threads)


def open_session(settings: RunSettings) -> PyTorchSession:
    """Build the model, find the data, trace. Raises ConfigError, LoadError or TraceError."""
    untrained = settings.dense_epochs == 0
    settings = filled(settings)
    processes = join(_device(settings.device))
    if isinstance(processes, SeveralProcesses):
        told = settings.model_dump(mode="json", exclude={"workers", "threads", "trust"})
        processes.check_same("command", digest(told))
    found = open_data(settings.data, settings.num_classes)
    built = _build(settings, found)
    _refuse_training_without_labels(settings, found, built, untrained)

    def original(source: ModelSource) -> nn.Module:
        # the user named this model, so its `python:` factory may run; a file may not name another
        if source != built.source:
            raise LoadError(f"the plan is of the model {_apart(source, built.source)}")
        return construct(source, allow_python=True)

    return PyTorchSession(settings, built, _bundle(settings, found, built), original, processes)


def _apart(found: ModelSource, wanted: ModelSource) -> str:
    """What tells two sources apart: their names, or the arguments of one name."""
    if found.name != wanted.name:
        return f"{found.name!r}, not of {wanted.name!r}"
    one, other = found.kwargs, wanted.kwargs
    names = [key for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]
    shown = [
        ", ".join(f"{key}={given[key]!r}" for key in names if key in given) or "none" for given in (one, other)
    ]
    return f"{found.name!r} with other arguments: {shown[0]}, not {shown[1]}"


def _build(settings: RunSettings, found: DataSource | None) -> BuiltModel:
    assert settings.model is not None
    return build(
        settings.model,
        classes=found.classes or None if found is not None else None,
        in_chans=found.in_chans if found is not None else None,
        image=found.image if found is not None else None,
        pretrained=settings.pretrained,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
        seed=settings.seed,
    )


def _refuse_training_without_labels(
    settings: RunSettings, found: DataSource | None, built: BuiltModel, untrained: bool
) -> None:
    """Raises ConfigError; random weights are taken where the user said so, `untrained`."""
    if found is None or found.classes:
        return
    if settings.epochs:
        raise ConfigError(
            f"nothing can be trained without labels: {found.name} has none; got --epochs {settings.epochs:g}, "
            "give --epochs 0",
            key="epochs",
        )
    if not built.has_weights and not untrained:
        raise ConfigError(
            f"{found.name} has no labels to train by, so the model needs weights: give --pretrained or "
            "--checkpoint",
            key="data",
        )


def _refuse_empty_parts(settings: RunSettings, processes: int) -> None:
    share = (settings.batch_size or 1) // processes
    if settings.accumulate > max(share, 1):
        of = f"a batch of {settings.batch_size}" + (f" shared by {processes} processes" if processes > 1 else "")
        raise ConfigError(
            f"{of} cannot be computed in {settings.accumulate} parts; --accumulate can be at most {max(share, 1)}",
            key="accumulate",
        )


def _refuse_mixing(settings: RunSettings, built: BuiltModel) -> None:
    """Raises ConfigError where training batches cannot be mixed as they are asked to be."""
    images = next((x for x in built.input.example(2) if isinstance(x, torch.Tensor)), None)
    if images is None:
        return
    shape = tuple(images.shape)
    if settings.cutmix and images.dim() != 4:
        raise ConfigError(
            f"--cutmix cuts rectangles out of images (batch, channels, height, width), the inputs are {shape}; "
            "take --mixup",
            key="cutmix",
        )
    if settings.mixup and not images.is_floating_point():
        raise ConfigError(f"--mixup blends images, the inputs are {images.dtype} {shape}", key="mixup")


def _bundle(settings: RunSettings, found: DataSource | None, built: BuiltModel) -> DataBundle | None:
    if found is None:
        return None
    assert settings.batch_size is not None
    options = LoadOptions(
        settings.batch_size,
        settings.holdout,
        settings.train_limit,
        settings.workers,
        Augmentation(settings.aa, settings.reprob),
        settings.steps_per_epoch,
    )
    return load_data(found, built.input, options)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}", key="device") from None
    return name


def _forward_macs(model: nn.Module, example: tuple[Any, ...]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        in_eval(model)(*example)
    return counter.get_total_flops() / 2


def output_classes(model: nn.Module, example: tuple[Any, ...]) -> int | None:
    """The length of the output for each sample; None where it is no (batch, classes)."""
    with torch.no_grad():
        output = in_eval(model)(*example)
    return int(output.shape[1]) if isinstance(output, torch.Tensor) and output.ndim == 2 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _provenance(settings: RunSettings) -> dict[str, Any]:
    return {
        "plugin": settings.plugin,
        "config": settings.config,
        "importance": settings.importance,
        "targets": list(settings.targets),
        "seed": settings.seed,
        "versions": _versions(),
    }
