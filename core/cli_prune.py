"""`optimize prune`: options to settings, and the run to a table or JSON."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from prunus.core.streams import stdout_for_json

if TYPE_CHECKING:
    from rich.console import Console

    from prunus.core.run_folder import RunFolder
    from prunus.core.settings import RunSettings

_METHOD, _MODEL, _DATA, _TRAINING, _RUN = "Method", "Model", "Data", "Training", "Run"
_RECIPE = "Training recipe (timm's names)"


def _option(*names: str, help: str, panel: str) -> Any:
    # what stands in brackets is a default, not markup
    return typer.Option(*names, help=escape(help), rich_help_panel=panel, show_default=False)


def prune(
    plugin: Annotated[
        str | None, _option("--plugin", help="Method [gsm-anneal]; name or package.module:Class.", panel=_METHOD)
    ] = None,
    target: Annotated[
        list[str] | None,
        _option(
            "--target",
            help="macs=50%, params=5M, size=8MB... [macs=50%]. Repeatable: all must hold.",
            panel=_METHOD,
        ),
    ] = None,
    importance: Annotated[
        str | None, _option("--importance", help="Estimator of one-shot and iterative [magnitude].", panel=_METHOD)
    ] = None,
    set_: Annotated[
        list[str] | None,
        _option(
            "--set",
            help="KEY=VALUE: a setting of the method; importance.KEY=VALUE of the estimator. Repeatable.",
            panel=_METHOD,
        ),
    ] = None,
    depth: Annotated[
        bool,
        _option("--depth", help="Let iterative remove whole residual blocks (--set depth=true).", panel=_METHOD),
    ] = False,
    teacher: Annotated[
        list[str] | None,
        _option(
            "--teacher", help="Further teacher for distillation: model or finished run. Repeatable.", panel=_METHOD
        ),
    ] = None,
    min_share: Annotated[
        float | None,
        _option("--min-share", help="Smallest share of its units a group keeps [0.05].", panel=_METHOD),
    ] = None,
    multiple_of: Annotated[
        int | None, _option("--multiple-of", help="Keep multiples of so many channels [1].", panel=_METHOD)
    ] = None,
    verify: Annotated[
        bool | None,
        _option(
            "--verify/--no-verify", help="Compare masked and pruned outputs at every removal [on].", panel=_METHOD
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "--model", help="timm/NAME, torchvision/NAME, prunus/NAME or python:module:factory.", panel=_MODEL
        ),
    ] = None,
    pretrained: Annotated[
        bool | None, _option("--pretrained/--no-pretrained", help="Start from published weights.", panel=_MODEL)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        _option(
            "--checkpoint", help="Start from this file (.safetensors, or .pth by weights_only).", panel=_MODEL
        ),
    ] = None,
    img_size: Annotated[
        int | None, _option("--img-size", help="Side of the input image in pixels.", panel=_MODEL)
    ] = None,
    adapter: Annotated[str | None, _option("--adapter", help="Framework adapter [pytorch].", panel=_MODEL)] = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            help="digits, fashion-mnist[:DIR], a folder, torch/cifar10, wds/..., hfds/..., images:DIR "
            "(no labels), none [digits].",
            panel=_DATA,
        ),
    ] = None,
    train_limit: Annotated[
        int | None, _option("--train-limit", help="Train on at most so many images.", panel=_DATA)
    ] = None,
    steps_per_epoch: Annotated[
        int | None, _option("--steps-per-epoch", help="Batches in an epoch of a stream (wds/...).", panel=_DATA)
    ] = None,
    num_classes: Annotated[
        int | None, _option("--num-classes", help="Classes of a stream (wds/...).", panel=_DATA)
    ] = None,
    holdout: Annotated[
        float | None, _option("--holdout", help="Share of train that is held out to judge by [0.1].", panel=_DATA)
    ] = None,
    workers: Annotated[int | None, _option("--workers", help="Processes that load data [0].", panel=_DATA)] = None,
    epochs: Annotated[
        float | None, _option("--epochs", help="The method's training budget; 0 trains nothing.", panel=_TRAINING)
    ] = None,
    dense_epochs: Annotated[
        float | None,
        _option("--dense-epochs", help="Train the dense model first, where it has no weights.", panel=_TRAINING),
    ] = None,
    batch_size: Annotated[int | None, _option("--batch-size", help="Images per step.", panel=_TRAINING)] = None,
    lr: Annotated[float | None, _option("--lr", help="Peak learning rate.", panel=_TRAINING)] = None,
    recovery_lr: Annotated[
        float | None,
        _option("--recovery-lr", help="After removals [by what was lost and how long].", panel=_TRAINING),
    ] = None,
    opt: Annotated[
        str | None, _option("--opt", help="sgd, adamw, or any of timm.optim: lamb... [sgd].", panel=_RECIPE)
    ] = None,
    sched: Annotated[
        str | None,
        _option("--sched", help="timm's cosine, tanh, poly or step [the method's cosine].", panel=_RECIPE),
    ] = None,
    decay_epochs: Annotated[
        float | None, _option("--decay-epochs", help="Epochs between two falls of step [90].", panel=_RECIPE)
    ] = None,
    decay_rate: Annotated[
        float | None, _option("--decay-rate", help="Factor of each fall of step [0.1].", panel=_RECIPE)
    ] = None,
    mixup: Annotated[float | None, _option("--mixup", help="alpha of mixup [0: off].", panel=_RECIPE)] = None,
    cutmix: Annotated[float | None, _option("--cutmix", help="alpha of cutmix [0: off].", panel=_RECIPE)] = None,
    smoothing: Annotated[
        float | None, _option("--smoothing", help="Label smoothing in training [0].", panel=_RECIPE)
    ] = None,
    aa: Annotated[
        str | None, _option("--aa", help="AutoAugment policy: rand-m9-n2-mstd0.5... [none].", panel=_RECIPE)
    ] = None,
    reprob: Annotated[
        float | None, _option("--reprob", help="Probability of random erasing [0].", panel=_RECIPE)
    ] = None,
    weight_decay: Annotated[float | None, _option("--weight-decay", help="Weight decay.", panel=_TRAINING)] = None,
    amp: Annotated[bool | None, _option("--amp/--no-amp", help="Mixed precision [off].", panel=_TRAINING)] = None,
    amp_dtype: Annotated[
        str | None, _option("--amp-dtype", help="bfloat16 or float16 [bfloat16].", panel=_TRAINING)
    ] = None,
    accumulate: Annotated[
        int | None, _option("--accumulate", help="Compute a batch in so many parts [1].", panel=_TRAINING)
    ] = None,
    clip_grad: Annotated[
        float | None, _option("--clip-grad", help="Largest norm of the gradients.", panel=_TRAINING)
    ] = None,
    model_ema: Annotated[
        bool | None,
        _option(
            "--model-ema/--no-model-ema", help="Average weights; keep what is better held out.", panel=_RECIPE
        ),
    ] = None,
    model_ema_decay: Annotated[
        float | None, _option("--model-ema-decay", help="Decay of the average [0.9998].", panel=_RECIPE)
    ] = None,
    torchcompile: Annotated[
        bool | None, _option("--torchcompile/--no-torchcompile", help="Compile the model [off].", panel=_TRAINING)
    ] = None,
    channels_last: Annotated[
        bool | None, _option("--channels-last/--no-channels-last", help="Memory layout [off].", panel=_TRAINING)
    ] = None,
    device: Annotated[
        str | None, _option("--device", help="cpu, cuda, cuda:1, mps, auto [cpu].", panel=_TRAINING)
    ] = None,
    threads: Annotated[int | None, _option("--threads", help="Threads for computing.", panel=_TRAINING)] = None,
    seed: Annotated[int | None, _option("--seed", help="Seed of everything random [0].", panel=_RUN)] = None,
    config: Annotated[
        Path | None, _option("--config", help="Settings from a run.toml; options override it.", panel=_RUN)
    ] = None,
    output: Annotated[Path | None, _option("--output", help="Folder of the run [runs/...].", panel=_RUN)] = None,
    resume: Annotated[
        Path | None, _option("--resume", help="Continue the run in this folder.", panel=_RUN)
    ] = None,
    overwrite: Annotated[bool, _option("--overwrite", help="Replace the run that is there.", panel=_RUN)] = False,
    registry: Annotated[
        list[Path] | None, _option("--registry", help="Further registry file. Repeatable.", panel=_RUN)
    ] = None,
    track: Annotated[
        list[str] | None,
        _option("--track", help="Send figures to tensorboard, wandb, mlflow, ... Repeatable.", panel=_RUN),
    ] = None,
    trust: Annotated[
        bool, _option("--trust", help="Allow a run folder to name code (python:...).", panel=_RUN)
    ] = False,
    schema: Annotated[
        bool, _option("--schema", help="Print the JSON Schema of run.toml and leave.", panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, _option("--json", help="One JSON object on stdout, everything else on stderr.", panel=_RUN)
    ] = False,
) -> int:
    """Make a model smaller: train it if needed, remove channels, recover, verify, save."""
    given = {name: value for name, value in locals().items() if value is not None and name in _SETTINGS}
    if target:
        given["targets"] = target
    if teacher:
        given["teachers"] = teacher
    from prunus.core.processes import Place
    from prunus.core.registry import Registry
    from prunus.core.run_folder import RunFolder, choose_folder

    if schema:
        return _print_schema()
    assignments = [*(set_ or []), *(["depth=true"] if depth else [])]
    with stdout_for_json(as_json) as out:
        entries = Registry.discover(registry or ())
        if resume is not None:
            begins = {"set": assignments, "output": output, "config": config, "overwrite": overwrite}
            refused = [name for name, value in begins.items() if value]
            folder, settings = RunFolder(resume), _resumed(RunFolder(resume), given, refused, trust)
        else:
            settings = _settings(config, {**given, "trust": trust}, assignments)
            folder = RunFolder(output or choose_folder(settings))
        if not Place.here().first:
            return _follow(settings, entries)
        report = _run(settings, folder, entries, resume=resume is not None, overwrite=overwrite)
        if as_json:
            out.write(json.dumps(report.for_scripts()) + "\n")
        else:
            from rich.console import Console

            from prunus.core.display import summary

            Console().print(summary(report))
    return 0 if report.target_met else 3


_OPTIONS = {"targets": "target", "teachers": "teacher"}
"""Settings whose option has another name."""
_SETTINGS = frozenset(
    {
        "plugin", "importance", "min_share", "multiple_of", "verify", "model", "pretrained", "checkpoint",
        "img_size", "adapter", "data", "train_limit", "holdout", "workers", "steps_per_epoch", "num_classes",
        "epochs", "dense_epochs", "batch_size", "lr", "recovery_lr", "opt", "weight_decay", "sched",
        "decay_epochs", "decay_rate", "mixup", "cutmix", "smoothing", "aa", "reprob", "amp", "amp_dtype",
        "accumulate", "clip_grad",
        "model_ema", "model_ema_decay", "torchcompile", "channels_last", "device", "threads", "seed", "track",
    }
)  # fmt: skip
_CHANGEABLE = {"workers", "threads", "track"}


def _settings(config: Path | None, given: dict[str, Any], assignments: list[str]) -> RunSettings:
    from prunus.core.settings import make_settings, override, read_settings

    if config is None:
        return make_settings(given).with_plugin_settings(assignments)
    values, left_out = override(read_settings(config), given)
    if left_out:
        print(
            f"optimize: not used of {config}, as options override what they belong to: {', '.join(left_out)}",
            file=sys.stderr,
        )
    return make_settings(values).with_plugin_settings(assignments)


def _resumed(folder: RunFolder, given: dict[str, Any], refused: list[str], trust: bool) -> RunSettings:
    from prunus.core.errors import ConfigError

    fixed = [*sorted(set(given) - _CHANGEABLE), *refused]
    if fixed:
        names = ", ".join(f"--{_OPTIONS.get(name, name).replace('_', '-')}" for name in fixed)
        raise ConfigError(f"{names} cannot be changed by --resume: the run goes on as it began", key=fixed[0])
    settings = folder.read_settings(trust)
    return settings.model_copy(update={k: v for k, v in given.items() if k in _CHANGEABLE})


def _run(settings: RunSettings, folder: RunFolder, registry: Any, *, resume: bool, overwrite: bool) -> Any:
    from rich.console import Console

    from prunus.core import pruning
    from prunus.core.display import RunDisplay
    from prunus.core.errors import ProcessError, TrainingError

    console = Console(stderr=True)
    again = f"optimize prune --resume {shlex.quote(str(folder.path))}{' --trust' if settings.code else ''}"
    try:
        with RunDisplay(console) as display:
            return pruning.prune(settings, folder, registry, display, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        _tell(console, folder, f"stopped; continue with: {again}")
        raise
    except OSError as error:
        _tell(console, folder, f"{error.strerror or error}; what was done is safe. Make room, then: {again}")
        raise
    except ProcessError:
        _tell(console, folder, f"what was done is safe; continue with: {again}")
        raise
    except TrainingError:
        _tell(
            console, folder, f"the last good state is kept in {folder.checkpoints}; start again with a lower --lr"
        )
        raise


def _follow(settings: RunSettings, registry: Any) -> int:
    from prunus.core import pruning

    pruning.follow(settings, registry)
    return 0


def _tell(console: Console, folder: RunFolder, text: str) -> None:
    """One line about a run that did not end, if it had begun."""
    if (folder.journal / "head.json").exists():
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _print_schema() -> int:
    from prunus.core.settings import RunSettings

    typer.echo(json.dumps(RunSettings.model_json_schema(), indent=1))
    return 0
