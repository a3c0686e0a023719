"""How much a layer's output distribution changes when a unit goes and the rest is refitted at best.

For a reader y = W x with input covariance C, the best linear refit after removing the inputs I leaves the
error  tr(W_I [(C^-1)_II]^-1 W_I^T): what the other inputs cannot explain of x_I (the Schur complement),
seen through the weights. Summed over all readers of a unit, each relative to its own output variance,
this is the discrepancy of methods.md, section 3.1. Removing one unit changes it for all others, so the
precision C^-1 and the folded weights are *downdated* after every pick (Optimal Brain Surgeon's rank-one
update, Hassibi & Stork 1993, applied to whole channels).

    rows    outputs times convolution taps of a reader      n   length of its `reads` axis
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.linalg.blas import dger

from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import Axis, ChannelGraph

_TINY = 1e-300


def ridged_precision(covariance: FloatArray, ridge: float) -> tuple[FloatArray, FloatArray]:
    """(C + lam I, its inverse), lam = `ridge` of the mean diagonal plus 1e-9: a dead layer is singular."""
    level = ridge * float(np.mean(np.diag(covariance))) + 1e-9
    ridged = covariance + level * np.eye(len(covariance))
    return ridged, np.asarray(np.linalg.inv(ridged), dtype=np.float64)


def conditional_covariance(precision: FloatArray, index: IntArray) -> FloatArray:
    """Covariance of each block of inputs given all others that are left: [(C^-1)_II]^-1.

    `index` (units, b) holds every unit's inputs, padded by -1; inputs that are gone have zero rows in
    `precision`. Returns (units, b, b), zero where an input is padding or gone.
    """
    there = (index >= 0) & (np.diagonal(precision)[index] > 0)
    if index.shape[1] == 1:
        diagonal = np.where(there, np.diagonal(precision)[index], 1.0)
        return np.asarray(there / diagonal)[:, :, None]
    pairs = there[:, :, None] & there[:, None, :]
    blocks = np.where(pairs, precision[index[:, :, None], index[:, None, :]], np.eye(index.shape[1]))
    return np.asarray(np.where(pairs, np.linalg.inv(blocks), 0.0))


def fold_away(precision: FloatArray, weight: FloatArray, gone: IntArray) -> None:
    """Remove inputs in place: what the others explain of them moves into `weight` (rows, n), and
    `precision` (n, n) becomes that of the inputs that are left; both are zero at `gone` afterwards.

    Fastest on Fortran-ordered arrays, where one input is one rank-one update without a temporary."""
    cross = precision[gone]
    explained = np.asarray(np.linalg.solve(cross[:, gone], cross), dtype=np.float64)
    _subtract_product(weight, weight[:, gone], explained)
    _subtract_product(precision, cross.T, explained)
    weight[:, gone] = 0.0
    precision[gone] = 0.0
    precision[:, gone] = 0.0


def _subtract_product(matrix: FloatArray, left: FloatArray, right: FloatArray) -> None:
    """matrix -= left @ right, in place."""
    if left.shape[1] == 1 and matrix.flags.f_contiguous:
        dger(-1.0, left[:, 0], right[0], a=matrix, overwrite_a=1)
    else:
        matrix -= left @ right


class Reader:
    """One weight along the axis by which it reads, with the precision of what it reads."""

    def __init__(
        self, weight: FloatArray, moments: FloatArray, inputs: Mapping[str, IntArray], ridge: float
    ) -> None:
        """`weight` (rows, n). `moments`: covariance (n, n), or variances (n,) where there is no covariance:
        then inputs count as uncorrelated and nothing is folded. `inputs`: group -> (units, b), padded by -1."""
        self.weight = np.array(weight, dtype=np.float64, order="F")
        self.inputs = dict(inputs)
        self._variance: FloatArray | None = None
        self._precision: FloatArray | None = None
        if moments.ndim == 1:
            self._variance = moments + ridge * float(np.mean(moments)) + 1e-9
            self.energy = (self.weight**2) @ self._variance
        else:
            ridged, precision = ridged_precision(moments, ridge)
            self._precision = np.asfortranarray(precision)
            self.energy = np.einsum("rn,rn->r", self.weight @ ridged, self.weight)
        self._conditional: dict[str, FloatArray] = {}
        self._loss: dict[str, FloatArray] = {}
        self._rescore()

    def discrepancy(self, group: str) -> FloatArray:
        """(units,): the share of the output variance (of the rows that are left) lost with each unit."""
        return np.asarray(self._loss[group] / max(float(self.energy.sum()), _TINY))

    def settle(self) -> None:
        """Nothing will be removed: only the discrepancies stay."""
        del self.weight, self._precision, self._conditional

    def remove_inputs(self, gone: IntArray) -> None:
        if self._precision is None:
            self.weight[:, gone] = 0.0
        else:
            gone = gone[np.diagonal(self._precision)[gone] > 0]
            if len(gone):
                fold_away(self._precision, self.weight, gone)
        self._rescore()

    def remove_rows(self, rows: IntArray) -> None:
        for group in self.inputs:
            self._loss[group] = np.maximum(self._loss[group] - self._lost(group, rows), 0.0)
        self.weight[rows] = 0.0
        self.energy[rows] = 0.0

    def _rescore(self) -> None:
        for group, index in self.inputs.items():
            if self._precision is not None:
                self._conditional[group] = conditional_covariance(self._precision, index)
            self._loss[group] = self._lost(group, None)

    def _lost(self, group: str, rows: IntArray | None) -> FloatArray:
        """(units,): output variance lost over the given rows."""
        weight = self.weight if rows is None else self.weight[rows]
        index = self.inputs[group]
        if self._variance is not None:
            per_input = np.einsum("rn,rn->n", weight, weight) * self._variance
            return np.asarray(np.where(index >= 0, per_input[index], 0.0).sum(axis=1))
        conditional = self._conditional[group]
        if index.shape[1] == 1:
            return np.asarray(np.einsum("rn,rn->n", weight, weight)[index[:, 0]] * conditional[:, 0, 0])
        blocks = weight[:, index]
        return np.asarray(np.einsum("ruc,ruc->u", np.einsum("rub,ubc->ruc", blocks, conditional), blocks))


class Discrepancy:
    """The discrepancy of every unit of every prunable group, kept right while units are removed."""

    def __init__(
        self,
        graph: ChannelGraph,
        weights: Mapping[str, FloatArray],
        moments: Mapping[str, FloatArray],
        ridge: float = 1e-3,
        sensitivity: Mapping[str, float] | None = None,
        *,
        scores_only: bool = False,
    ) -> None:
        """`weights` by tensor name: all that are in `sliced_weights(graph)`. `moments` by tensor name:
        covariance (n, n) or variances (n,) of what it reads; a reader without counts every input as 1.
        `sensitivity`: a factor for every unit of a group, 1 if not named. `scores_only`: nothing will be
        removed, so the precisions, as large as all covariances, are not kept."""
        self._factor = {name: (sensitivity or {}).get(name, 1.0) for name in graph.prunable}
        self._inputs: dict[str, list[tuple[Reader, IntArray]]] = {name: [] for name in graph.prunable}
        self._rows: dict[str, list[tuple[Reader, list[IntArray]]]] = {name: [] for name in graph.prunable}
        self._blind: dict[str, FloatArray] = {}
        for axis in reading_axes(graph):
            reader = self._add(graph, axis, np.asarray(weights[axis[0]]), moments.get(axis[0]), ridge)
            if scores_only:
                reader.settle()
        for name in graph.prunable:
            if not self._inputs[name]:
                self._blind[name] = _share_of_writers(graph, name, weights)

    def _add(
        self, graph: ChannelGraph, axis: Axis, weight: FloatArray, moments: FloatArray | None, ridge: float
    ) -> Reader:
        matrix = np.moveaxis(weight, axis[1], -1)
        row_ids = np.arange(matrix[..., 0].size).reshape(matrix.shape[:-1])
        n = matrix.shape[-1]
        if moments is None or len(moments) != n:
            moments = np.ones(n)
        reader = Reader(matrix.reshape(-1, n), moments, _inputs_of(graph, axis), ridge)
        for name, index in reader.inputs.items():
            self._inputs[name].append((reader, index))
        others = [k for k in range(weight.ndim) if k != axis[1]]
        for position, other in enumerate(others):
            for name, piece in graph.slices_of.get((axis[0], other), ()):
                if name in self._rows:
                    rows = [
                        np.take(row_ids, np.flatnonzero(piece.unit_of == unit), axis=position).ravel()
                        for unit in range(graph.groups[name].units)
                    ]
                    self._rows[name].append((reader, rows))
        return reader

    def of(self, group: str) -> FloatArray:
        """(units,): summed over the readers; 0 for units that are gone. A group that nothing reads through
        a weight has its share of the writing weights' energy instead."""
        if group in self._blind:
            return self._factor[group] * self._blind[group]
        lost = np.sum([reader.discrepancy(group) for reader, _ in self._inputs[group]], axis=0)
        return np.asarray(self._factor[group] * lost)

    def remove(self, group: str, unit: int) -> set[str]:
        """Remove one unit; the names of the groups whose discrepancies changed."""
        changed = {group}
        for reader, index in self._inputs[group]:
            gone = index[unit]
            reader.remove_inputs(gone[gone >= 0])
            changed.update(reader.inputs)
        for reader, rows in self._rows[group]:
            if len(rows[unit]):
                reader.remove_rows(rows[unit])
                changed.update(reader.inputs)
        return changed


def reading_axes(graph: ChannelGraph) -> list[Axis]:
    """The axes by which weights read prunable units, in the order the model uses them."""
    prunable = graph.prunable
    return [
        axis
        for axis, pieces in graph.slices_of.items()
        if any(piece.role == "reads" and name in prunable for name, piece in pieces)
    ]


def sliced_weights(graph: ChannelGraph) -> list[str]:
    """The tensors `Discrepancy` needs: readers of prunable groups, and writers of those nothing reads."""
    reading = {tensor for tensor, _ in reading_axes(graph)}
    read = {name for axis in reading_axes(graph) for name, piece in graph.slices_of[axis] if piece.role == "reads"}
    blind = {
        piece.tensor for name, g in graph.prunable.items() if name not in read for piece in g.with_role("writes")
    }
    return [tensor for tensor in graph.tensors if tensor in reading | blind]


def _inputs_of(graph: ChannelGraph, axis: Axis) -> dict[str, IntArray]:
    """group -> (units, b) input indices on this axis, padded by -1."""
    members: dict[str, list[list[int]]] = {}
    for name, piece in graph.slices_of[axis]:
        if name in graph.prunable:
            lists = members.setdefault(name, [[] for _ in range(graph.groups[name].units)])
            for position in np.flatnonzero(piece.unit_of >= 0):
                lists[int(piece.unit_of[position])].append(int(position))
    inputs = {}
    for name, lists in members.items():
        width = max(1, *(len(one) for one in lists))
        inputs[name] = np.array([one + [-1] * (width - len(one)) for one in lists], dtype=np.int64)
    return inputs


def _share_of_writers(graph: ChannelGraph, name: str, weights: Mapping[str, FloatArray]) -> FloatArray:
    group = graph.groups[name]
    energy = np.zeros(group.units)
    for piece in group.with_role("writes"):
        per_index = np.moveaxis(np.asarray(weights[piece.tensor]), piece.axis, 0)
        per_index = (per_index.reshape(len(per_index), -1) ** 2).sum(axis=1)
        member = piece.unit_of >= 0
        np.add.at(energy, piece.unit_of[member], per_index[member])
    return np.asarray(energy / max(float(energy.sum()), _TINY))
