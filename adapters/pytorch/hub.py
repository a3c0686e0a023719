"""A finished run as a folder for the Hugging Face hub, and models read from such folders.

    config.json        plan, input and classes
    model.safetensors  the weights
    README.md          the model card, made from the report

No pickle and no code: the model is built by name from an installed library, its plan replayed, its weights
loaded strictly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from prunus.adapters.pytorch.artifact import (
    MAX_PLAN_BYTES,
    WEIGHTS_FILE,
    answer,
    largest_difference,
    load,
    read_plan,
    rebuilt,
)
from prunus.adapters.pytorch.catalog import construct
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.weights import read_tensors, write_tensors
from prunus.core.errors import ConfigError, LoadError, MissingDependencyError, VerificationError
from prunus.core.export import ExportReport, Parity
from prunus.core.files import write_atomically
from prunus.core.finished import read_report
from prunus.core.model_card import model_card
from prunus.core.plan import UNNAMED, ModelSource, PruningPlan
from prunus.core.plugin_settings import first_problem

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
_FILES = (CONFIG_FILE, CARD_FILE, WEIGHTS_FILE)


class HubConfig(BaseModel):
    """config.json."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    library_name: str = Field(default="prunus", pattern="^prunus$")
    architecture: str
    """The original model's name, for readers; the plan holds it, too."""
    num_classes: int | None
    input: dict[str, Any]
    """Size (channels, height, width), mean, std, interpolation and crop share of what the model wants to see."""
    prunus: PruningPlan


def write_folder(run: Path, folder: Path, spec: InputSpec, *, real: Tensor | None, trust: bool) -> ExportReport:
    """Write the model of the finished run into `folder`, read it from there and compare the outputs.

    `spec` is the model's input. `real` are images to compare on besides random ones. Raises ConfigError if the
    folder holds other things, LoadError if the run is damaged, VerificationError if the outputs differ.
    """
    _refuse_strangers(folder)
    report, plan = read_report(run), read_plan(run)
    folder.mkdir(parents=True, exist_ok=True)
    config = HubConfig(architecture=plan.model.name, num_classes=report.classes, input=spec.to_json(), prunus=plan)
    write_tensors(folder / WEIGHTS_FILE, read_tensors(run / WEIGHTS_FILE), {"format": "pt"})
    write_atomically(folder / CONFIG_FILE, config.model_dump_json(by_alias=True, indent=1))
    write_atomically(folder / CARD_FILE, model_card(report, _usage(plan), _limits(plan)))
    made, read = load(run, trust=trust), from_pretrained(folder, trust=trust)
    checks = [_compared(made, read, "random", spec.example(batch), folder) for batch in (2, 1)]
    if real is not None:
        checks.append(_compared(made, read, "real", (real,), folder))
    size = sum((folder / name).stat().st_size for name in _FILES)
    return ExportReport(folder, "hub", size, True, tuple(checks))


def _compared(
    made: nn.Module, read: nn.Module, kind: Literal["random", "real"], example: tuple[Any, ...], folder: Path
) -> Parity:
    """Both models run the same code on the same weights: anything but equality is a fault."""
    expected = answer(made, example)
    difference = largest_difference(expected, answer(read, example))
    scale = max((float(y.abs().max()) for y in expected if y.numel()), default=0.0)
    if difference != 0.0:
        raise VerificationError(
            f"the model read from {folder} differs by {difference:.3g} from the run's",
            max_error=difference,
            scale=scale,
        )
    return Parity(kind, len(example[0]), difference, scale)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    original: nn.Module | None = None,
    trust: bool = False,
) -> nn.Module:
    """The model of a folder that `optimize export RUN --format hub` wrote, or of a repository of the hub.

    `name` is a folder, or `OWNER/NAME` of a repository (fetched, or taken from the hub's local cache) at
    `revision`. The result is a plain module of its original class, on the CPU, in eval mode. `original` is
    a fresh model of the original architecture, for models without a name; `trust` allows one named
    `python:module:factory`, whose code is then imported. Raises LoadError or PlanError.
    """
    folder = Path(name) if Path(name).is_dir() else _fetched(str(name), revision)
    config = read_config(folder)

    def build(source: ModelSource) -> nn.Module:
        return original if original is not None else construct(source, allow_python=trust)

    return rebuilt(config.prunus, folder / WEIGHTS_FILE, build)


def read_config(folder: Path) -> HubConfig:
    """Read and validate config.json. Raises LoadError with the first thing that is wrong."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise LoadError(f"{path} is larger than {MAX_PLAN_BYTES >> 20} MiB: not a model's configuration")
        return HubConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(f"{folder} holds no model: {CONFIG_FILE} is missing") from None
    except ValidationError as error:
        raise LoadError(f"{path} is not a model of prunus: {first_problem(error)}") from None
    except (OSError, RecursionError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from None


def push_folder(folder: Path, repository: str) -> str:
    """Upload the folder to `OWNER/NAME` on the hub, which is created if need be, and return its address.

    Raises LoadError if the hub cannot be reached or refuses: log in with `hf auth login` first.
    """
    hub = _library()
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(_FILES))
    except Exception as error:  # the client's own, its HTTP library's, the system's
        raise LoadError(
            f"{folder} was written, but could not be pushed to {repository!r}: {_reason(error)}; "
            "log in with `hf auth login` and check the name"
        ) from error
    return f"{hub.constants.ENDPOINT}/{repository}"


def _fetched(name: str, revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoadError(f"no folder at {name!r}, and it is not OWNER/NAME of a repository either")
    hub = _library()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # as in push_folder
        raise LoadError(f"no folder at {name!r}, and the hub does not give it: {_reason(error)}") from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependencyError("the Hugging Face hub", "pip install huggingface_hub") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _refuse_strangers(folder: Path) -> None:
    """Only an earlier export is ever overwritten."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a hub export is a folder", key="output")
    strangers = sorted({path.name for path in folder.iterdir()} - set(_FILES))
    if strangers:
        raise ConfigError(
            f"folder {folder} holds other things ({strangers[0]}, ...); choose another --output", key="output"
        )


def _usage(plan: PruningPlan) -> str:
    """Python code that loads the model."""
    kinds = {"python": ", trust=True", "object": ", original=MyModel()"}
    more = kinds.get(plan.model.name.partition(":")[0], "")
    return (
        "from prunus.adapters.pytorch import from_pretrained\n\n"
        f'model = from_pretrained("OWNER/NAME"{more})  # or the path of this folder\n'
    )


def _limits(plan: PruningPlan) -> Sequence[str]:
    name = plan.model.name
    if name.startswith("python:"):
        return [f"The architecture is built by the code {name}, which is not part of this folder."]
    if name.startswith(UNNAMED):
        return [
            "The architecture has no name: pass a fresh model of it as `original=` to `from_pretrained` "
            f"(it was a {name.removeprefix(UNNAMED)})."
        ]
    library = name.partition("/")[0]
    return [f"Loading builds the architecture with the installed {library}; another version may have changed it."]
