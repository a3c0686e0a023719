"""Files that other runtimes read: ONNX and torch.export programs, each checked against the model.

An export is written only once its answers equal the model's (within `TOLERANCE` of the largest output), on
random inputs at two batch sizes and on real images if there are any.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.copies import copied, in_eval
from prunus.core.errors import MissingDependencyError, TraceError, VerificationError
from prunus.core.export import TOLERANCE, ExportFormat, ExportReport, Parity
from prunus.core.files import write_atomically

Inputs = tuple[Tensor, ...]
Runner = Callable[[Inputs], list[Tensor]]
"""An exported file, ready to answer: the flat outputs for one batch."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 2**31 - 2**24
"""Bytes of weights that fit into one ONNX file (a protocol buffer ends at 2 GiB)."""


def export_onnx(
    model: nn.Module,
    example: Sequence[Any],
    path: Path,
    *,
    real: Sequence[Any] | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write `model` as ONNX: checked by onnx, and by onnxruntime against the model's own answers.

    `example` holds the forward's tensors, batch first; `real` the same of real images. Weights beyond 2 GiB
    go to a second file beside the first. The model is left as it was. Raises MissingDependencyError
    without the extra `[onnx]`, TraceError if the model cannot be exported, VerificationError if the
    file answers differently.
    """
    for package in _ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"ONNX export (package {package})", "pip install 'prunus[onnx]'")
    return _export(model, example, real, path, dynamic_batch, "onnx", _to_onnx)


def export_program(
    model: nn.Module,
    example: Sequence[Any],
    path: Path,
    *,
    real: Sequence[Any] | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write `model` as a torch.export archive (.pt2), loaded again and compared with the model.

    Arguments and errors as in `export_onnx`; needs nothing but torch.
    """
    return _export(model, example, real, path, dynamic_batch, "program", _to_archive)


class _Write(Protocol):
    def __call__(
        self, model: nn.Module, example: Sequence[Any], path: Path, *, real: Sequence[Any] | None = None
    ) -> ExportReport: ...


EXPORTS: dict[ExportFormat, _Write] = {"onnx": export_onnx, "program": export_program}


def _export(
    model: nn.Module,
    example: Sequence[Any],
    real: Sequence[Any] | None,
    path: Path,
    dynamic_batch: bool,
    form: ExportFormat,
    convert: Callable[[ExportedProgram, _Captured, Path], Runner],
) -> ExportReport:
    inputs = _tensors(model, example)
    own = in_eval(copied(model).cpu())  # exporting leaves fake tensors in caches of derived ones
    captured = _capture(own, inputs, dynamic_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        with _quiet():
            run = convert(captured.program, captured, draft)
        samples: list[tuple[Literal["random", "real"], Inputs]] = [("random", captured.inputs)]
        if captured.dynamic:
            samples.append(("random", tuple(x[:1] for x in captured.inputs)))
        if real is not None:
            samples.append(("real", _fitted(_tensors(model, real), captured)))
        checks = tuple(_compare(own, run, inputs, kind, path) for kind, inputs in samples)
        size = 0
        for file in sorted(Path(folder).iterdir()):
            size += file.stat().st_size
            write_atomically(path.with_name(file.name), file.replace)
    return ExportReport(path, form, size, captured.dynamic, checks, captured.notes)


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    program: ExportedProgram
    inputs: Inputs
    """What the program was captured with, and is compared on first."""
    dynamic: bool
    notes: tuple[str, ...]


def _capture(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> _Captured:
    """The program of `model`, for any batch size if asked for and possible."""
    notes: tuple[str, ...] = ()
    if dynamic_batch:
        several = tuple(torch.cat([x, x.flip(-1)]) if len(x) == 1 else x for x in inputs)  # 1 would be a constant
        try:
            return _Captured(_captured(model, several, tuple({0: Dim.DYNAMIC} for _ in inputs)), several, True, ())
        except Exception as error:  # any model code may run here
            notes = (f"the batch size is fixed to {len(inputs[0])}: {_reason(error)}",)
    try:
        return _Captured(_captured(model, inputs, None), inputs, False, notes)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be captured by torch.export: {_reason(error)}") from error


def _captured(model: nn.Module, inputs: Inputs, shapes: tuple[dict[int, Any], ...] | None) -> ExportedProgram:
    fresh = tuple(x.clone() for x in inputs)  # torch marks dynamic axes on the tensors themselves
    with _quiet(), torch.no_grad():
        return torch.export.export(model, fresh, dynamic_shapes=shapes, strict=False)


def _to_onnx(program: ExportedProgram, captured: _Captured, path: Path) -> Runner:
    import onnx  # an extra: needed here alone
    import onnxruntime

    inputs, outputs = _names(program, len(captured.inputs))
    try:
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs, external_data=False
        )
        assert exported is not None
        for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
            _name_batch(value, captured.dynamic)
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        exported.save(str(path), external_data=weights > _ONE_FILE)
        onnx.checker.check_model(str(path), full_check=weights <= _ONE_FILE)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        raise TraceError(f"the model cannot be exported to ONNX: {_reason(error)}") from error
    taken = {value.name for value in session.get_inputs()}  # an input that the model ignores is not among them

    def run(batch: Inputs) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(inputs, batch, strict=True) if name in taken}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


def _to_archive(program: ExportedProgram, captured: _Captured, path: Path) -> Runner:
    try:
        torch.export.save(program, path)
        again = torch.export.load(path).module()
    except OSError:
        raise
    except Exception as error:
        raise TraceError(f"the model cannot be exported as a program: {_reason(error)}") from error
    return lambda batch: _answer(again, batch)


def _names(program: ExportedProgram, inputs: int) -> tuple[list[str], list[str]]:
    """Names that do not change with the exporter: "input", "output", numbered where there are several."""
    outputs = len(program.graph_signature.user_outputs)
    return _numbered("input", inputs), _numbered("output", outputs)


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]


def _name_batch(value: Any, dynamic: bool) -> None:
    """The free first dimension is called "batch", whatever symbol the capture gave it."""
    import onnx_ir

    if dynamic and value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
        value.shape[0] = onnx_ir.SymbolicDim("batch")


def _compare(model: nn.Module, run: Runner, inputs: Inputs, kind: Literal["random", "real"], path: Path) -> Parity:
    expected = _answer(model, inputs)
    try:
        with _quiet():
            given = run(inputs)
    except Exception as error:  # the runtime's own
        raise TraceError(f"{path.name} does not run on a batch of {len(inputs[0])}: {_reason(error)}") from error
    shapes, wanted = [tuple(y.shape) for y in given], [tuple(y.shape) for y in expected]
    if shapes != wanted:
        raise VerificationError(
            f"{path.name} answers with shapes {shapes}, the model with {wanted}", max_error=float("inf"), scale=1.0
        )
    scale = max((float(y.abs().max()) for y in expected if y.numel()), default=0.0)
    differences = [float((a.double() - b.double()).abs().max()) for a, b in zip(given, expected, strict=True)]
    parity = Parity(kind, len(inputs[0]), max(differences, default=0.0), scale)
    if not parity.relative_error <= TOLERANCE:  # NaN is no agreement
        raise VerificationError(
            f"{path.name} differs from the model by {parity.relative_error:.2g} of its largest output on {kind} "
            f"inputs (batch {parity.batch}); at most {TOLERANCE:g} is allowed; nothing was written",
            max_error=parity.max_error,
            scale=scale,
        )
    return parity


def _answer(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_flatten(model(*inputs))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _tensors(model: nn.Module, example: Sequence[Any]) -> Inputs:
    if not all(isinstance(x, Tensor) and x.dim() for x in example) or not example:
        raise TraceError(
            f"{type(model).__name__} takes inputs other than batches of tensors: it cannot be exported"
        )
    return tuple(x.detach().cpu().float() for x in example)


def _fitted(real: Inputs, captured: _Captured) -> Inputs:
    """Real images in the batch size that the file takes."""
    if captured.dynamic:
        return real
    size = len(captured.inputs[0])
    return tuple(torch.cat([x] * -(-size // len(x)))[:size] for x in real)


def _reason(error: Exception) -> str:
    """The first line of the innermost cause: exporters wrap it in pages of advice."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print, warn and log; stdout belongs to --json."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
