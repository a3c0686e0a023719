"""The energy of every unit's contribution to what reads it, from four sources (methods, section 2.2).

`conditional` counts what the others do not know of a unit's inputs, x_i | the others, through its own weights.
`refitted` counts what the reader loses: once the others are refitted to go without those that may leave, their
weights carry more, and the last one that knows something is worth all that ever passed there. So energies of
different groups can be compared, as shares of what their readers compute, and no group is emptied.

readers   weights with a `reads` axis; one axis may carry units of several groups
index     a position on that axis; a unit owns one or more of them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import lapack

from prunus.core.cost import FloatArray, IntArray
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph, Slice
from prunus.core.signals import Signal, SignalReader
from prunus.plugins.fpgm import unit_rows
from prunus.plugins.magnitude import power_sum

Source = Literal["refitted", "conditional", "weight", "gate_fisher"]
_SEEN = frozenset({Signal.WEIGHT, Signal.ACTIVATION_VARIANCE, Signal.ACTIVATION_COVARIANCE})
SIGNALS: dict[Source, frozenset[Signal]] = {
    "refitted": _SEEN,
    "conditional": _SEEN,
    "weight": frozenset({Signal.WEIGHT, Signal.ACTIVATION_VARIANCE}),
    "gate_fisher": frozenset({Signal.WEIGHT, Signal.GATE_FISHER}),
}
SMALL = 512
"""Readers with at most so many inputs are inverted at every update, wider ones where it changes something."""
_STALE = 0.1
"""The change from which on a wide reader is inverted again, as a share of the inputs expected to survive."""
_RIDGE = 1e-4
_LEAST = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The units of one group on one reader's axis."""

    group: str
    unit_of: IntArray
    members: IntArray | None
    """(units, r): each unit's indices, if covariances are known and every unit has equally many, more than one."""
    gram: FloatArray | None
    """(units, r, r): sum of w w^T over outputs and taps, beside `members`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    tensor: str
    norms: FloatArray
    """(n,): squared norm of the weights of every index."""
    spread: FloatArray
    """(n, n) covariance or (n,) variance of the inputs."""
    root: FloatArray | None
    """(k, n), k <= n: R^T R = W^T W over outputs and taps, if refitted weights are asked for and C is known."""
    output: float
    """What energies are divided by: tr(W C W^T), the variance of all that the reader computes, or 1."""
    parts: tuple[_Part, ...]


class Energies:
    """Statistics of all readers, and the energies that they give."""

    def __init__(self, graph: ChannelGraph, signals: SignalReader, source: Source) -> None:
        self.source = source
        self._readers: list[_Reader] = []
        self._fixed: dict[str, FloatArray] = {}
        self._units = {name: group.units for name, group in graph.prunable.items()}
        self._cached: dict[int, tuple[FloatArray, list[FloatArray]]] = {}
        """Reader -> (survival of its inputs, energies) of the last inversion."""
        self.assumed_variance = False
        """True if no activations were seen and every input was taken to have variance 1."""
        if source == "gate_fisher":
            self._fixed = {name: np.array(signals.read(Signal.GATE_FISHER, name)) for name in self._units}
        else:
            self._collect(graph, signals)
        self.sizes = {name: _contribution_size(graph, name) for name in self._units}
        """group -> (units,): how many numbers a unit's contribution consists of."""

    def _collect(self, graph: ChannelGraph, signals: SignalReader) -> None:
        read: set[str] = set()
        for (tensor, axis), pieces in graph.slices_of.items():
            mine = [(g, p) for g, p in pieces if p.role == "reads" and g in self._units]
            if not mine:
                continue
            weight = signals.read(Signal.WEIGHT, tensor)
            every = np.arange(weight.shape[axis], dtype=np.int64)
            norms = power_sum(weight, Slice(tensor, axis, "reads", every), len(every))
            spread = self._spread(signals, tensor, len(every))
            parts = tuple(_part(g, p, weight, self._units[g], blocks=spread.ndim == 2) for g, p in mine)
            root, output = None, 1.0
            if self.source == "refitted":
                output = float(norms @ spread) if spread.ndim == 1 else 0.0
                if spread.ndim == 2:
                    root = _root(np.moveaxis(weight, axis, -1).reshape(-1, len(every)))
                    output = float(((root @ spread) * root).sum())
                output = max(output, 1e-300)
            self._readers.append(_Reader(tensor, norms, spread, root, output, parts))
            read |= {g for g, _ in mine}
        for name in self._units.keys() - read:
            energy = _writers_energy(graph, name, signals)
            self._fixed[name] = energy / max(float(energy.sum()), 1e-300) if self.source == "refitted" else energy

    def _spread(self, signals: SignalReader, tensor: str, length: int) -> FloatArray:
        if self.source in ("refitted", "conditional") and signals.has(Signal.ACTIVATION_COVARIANCE, tensor):
            return signals.read(Signal.ACTIVATION_COVARIANCE, tensor)
        if signals.has(Signal.ACTIVATION_VARIANCE, tensor):
            return signals.read(Signal.ACTIVATION_VARIANCE, tensor)
        self.assumed_variance = True
        return np.ones(length)

    def at(self, survival: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """group -> (units,): energies when the other units survive with the given probabilities.

        With N_jj = C_jj (1-pi_j)/pi_j as noise on every input, all summed over readers:

        `conditional`: ||W_i||^2 Var(x_i | the others); `weight`: ||W_i||^2 Var(x_i);
        `refitted`: ||Cov(W x, x_i | the others)||^2 / Var(x_i | the others), over the reader's output variance:
        the part of it that is lost without the unit and regained with it, the others refitted.

        A unit of several indices takes the block of its own indices given the rest. Groups that nothing reads
        through a weight have the energy of their writing weights instead.
        """
        totals = {name: self._fixed.get(name, np.zeros(units)).copy() for name, units in self._units.items()}
        for k, reader in enumerate(self._readers):
            alive = _alive(reader, survival)
            last = self._cached.get(k)
            small = len(reader.norms) <= SMALL
            if last is None or small or float(np.abs(alive - last[0]).sum()) > _STALE * float(alive.sum()):
                self._cached[k] = alive, _reader_energies(reader, alive, self._units)
            for part, energy in zip(reader.parts, self._cached[k][1], strict=True):
                totals[part.group] += energy / reader.output
        for name, values in totals.items():
            if not np.isfinite(values).all():
                raise PluginError("gsm-anneal", "energies are finite", f"Group {name!r} has NaN or infinity.")
        return totals

    @property
    def unexplained(self) -> float:
        """At the last call of `at`: the part of contributions that the other units do not carry, 0..1."""
        whole = found = 0.0
        for k, (_, parts) in self._cached.items():
            reader = self._readers[k]
            variance = reader.spread if reader.spread.ndim == 1 else np.diag(reader.spread)
            for part, energy in zip(reader.parts, parts, strict=True):
                mine = part.unit_of >= 0
                whole += float((reader.norms * variance)[mine].sum())
                found += float(energy.sum())
        return min(found / whole, 1.0) if whole > 0 else 1.0

    def of_reader(self, tensor: str) -> dict[str, FloatArray]:
        """group -> (units,): what the last call of `at` found at one reader; empty if it reads no unit."""
        for k, reader in enumerate(self._readers):
            if reader.tensor == tensor and k in self._cached:
                return {part.group: e for part, e in zip(reader.parts, self._cached[k][1], strict=True)}
        return {}


def _part(group: str, piece: Slice, weight: FloatArray, units: int, *, blocks: bool) -> _Part:
    owned = np.flatnonzero(piece.unit_of >= 0)
    sizes = np.bincount(piece.unit_of[owned], minlength=units)
    if not blocks or sizes.max() == 1 or sizes.min() != sizes.max():
        return _Part(group, piece.unit_of, None, None)
    members = owned[np.argsort(piece.unit_of[owned], kind="stable")].reshape(units, -1)
    rows = unit_rows(weight, piece, units).reshape(units, members.shape[1], -1)
    return _Part(group, piece.unit_of, members, rows @ rows.transpose(0, 2, 1))


def _alive(reader: _Reader, survival: Mapping[str, FloatArray]) -> FloatArray:
    """(n,): the probability that an index survives."""
    alive = np.ones(len(reader.norms))
    for part in reader.parts:
        mine = part.unit_of >= 0
        alive[mine] *= survival[part.group][part.unit_of[mine]]
    return np.maximum(alive, _LEAST)


def _reader_energies(reader: _Reader, alive: FloatArray, units: Mapping[str, int]) -> list[FloatArray]:
    if reader.spread.ndim == 1:
        return [_by_unit(part, reader.norms * reader.spread, units[part.group]) for part in reader.parts]
    variance = np.diag(reader.spread)
    noise = variance * (1 - alive) / alive + _RIDGE * float(variance.mean()) + 1e-30
    precision = spd_inverse(reader.spread + np.diag(noise))
    refitted = None if reader.root is None else _refitted(reader.root, precision, noise)
    found = []
    for part in reader.parts:
        if part.members is None or part.gram is None:
            known = np.diag(precision)
            if refitted is None:
                per_index = reader.norms * np.maximum(1 / known - noise, 0.0)
            else:
                per_index = (refitted**2).sum(axis=0) / (known * np.maximum(1 - noise * known, _LEAST**2))
            found.append(_by_unit(part, per_index, units[part.group]))
            continue
        own = part.members[:, :, None], part.members[:, None, :]
        blocks = np.asarray(np.linalg.inv(precision[own]), dtype=np.float64)
        if refitted is None:
            norms = np.diagonal(part.gram, axis1=1, axis2=2)
            energy = (part.gram * blocks).sum(axis=(1, 2)) - (norms * noise[part.members]).sum(axis=1)
        else:
            mine = refitted[:, part.members]
            energy = _block_energies(np.einsum("kur,kus->urs", mine, mine), blocks, noise[part.members])
        found.append(np.maximum(energy, 0.0))
    return found


def _root(rows: FloatArray) -> FloatArray:
    """R of R^T R = `rows`^T `rows` with as few rows as columns, since a 3 x 3 kernel has nine times as many."""
    return rows if len(rows) <= rows.shape[1] else np.asarray(np.linalg.qr(rows, mode="r"))


def _refitted(root: FloatArray, precision: FloatArray, noise: FloatArray) -> FloatArray:
    """W' = W C (C + N)^-1 for W given as `root`: the best map from noisy inputs to what W makes of clean ones."""
    return np.asarray(root - (root * noise) @ precision)


def _block_energies(gram: FloatArray, blocks: FloatArray, noise: FloatArray) -> FloatArray:
    """(units,): tr(K^T V^-1 K) with K = Cov(x_I, W x | the others) and V = Var(x_I | the others).

    `gram`: (units, r, r) of the refitted weights W'_I = K^T [(C + N)^-1]_II; `blocks`: its inverses, V + N.
    """
    size = blocks.shape[1]
    given_rest = blocks - noise[:, :, None] * np.eye(size)
    floor = _LEAST**2 * np.trace(blocks, axis1=1, axis2=2) / size
    inverse = np.linalg.inv(given_rest + floor[:, None, None] * np.eye(size))
    return np.asarray(np.trace(gram @ blocks @ inverse @ blocks, axis1=1, axis2=2))


def _by_unit(part: _Part, per_index: FloatArray, units: int) -> FloatArray:
    mine = part.unit_of >= 0
    return np.bincount(part.unit_of[mine], weights=per_index[mine], minlength=units).astype(np.float64)


def spd_inverse(matrix: FloatArray) -> FloatArray:
    """Inverse of a symmetric positive definite matrix, by Cholesky."""
    factor, failed = lapack.dpotrf(matrix, lower=True)
    if failed:
        return np.asarray(np.linalg.pinv(matrix, hermitian=True), dtype=np.float64)
    inverse, _ = lapack.dpotri(factor, lower=True)
    lower = np.tril(inverse)
    return np.asarray(lower + np.tril(inverse, -1).T, dtype=np.float64)


def _writers_energy(graph: ChannelGraph, name: str, signals: SignalReader) -> FloatArray:
    group = graph.groups[name]
    total = np.zeros(group.units)
    for piece in group.with_role("writes") or group.slices:
        total += power_sum(signals.read(Signal.WEIGHT, piece.tensor), piece, group.units)
    return total


def _contribution_size(graph: ChannelGraph, name: str) -> FloatArray:
    group = graph.groups[name]
    size = np.zeros(group.units)
    for piece in group.with_role("reads") or group.with_role("writes") or group.slices:
        shape = graph.tensors[piece.tensor]
        mine = piece.unit_of[piece.unit_of >= 0]
        per_index = float(np.prod(shape, dtype=np.float64)) / shape[piece.axis]
        size += np.bincount(mine, minlength=group.units) * per_index
    return np.maximum(size, 1.0)
