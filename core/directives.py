"""What a policy can ask of an adapter, and what comes back.

A policy yields a directive and receives the observation that belongs to it. All of it is plain data:
names, numbers and numpy arrays keyed by group name, in the coordinates of the *current* graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGraph, Keep
from prunus.core.plan import PruningPlan
from prunus.core.signals import Signal, SignalReader

Split = Literal["train", "holdout", "calibration"]
"""`holdout`: a stratified part of train that nothing trains on. `calibration`: images of the rest of train,
without augmentation; labels are used only where a signal needs them. The test set is out of reach."""
Refit = Literal["none", "bias", "least-squares", "sequential"]
"""How the kept weights are refitted to the dense model's function (methods, section 0)."""
Gates = Mapping[str, FloatArray]
"""group -> (units,) in [0, 1] (joint-search: [0, 2]); groups not named have gates 1.
Blocks have gates, too, where a model is looked at or trained: block -> (1,), a factor of what it adds."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """Teachers during training: loss = (1 - weight) CE + weight T^2 sum_k w_k(x) KL(p_k || p_student)."""

    teachers: tuple[str, ...] = ("dense",)
    """Names of snapshots: "dense" unless the method starts from scratch, "ema" if the training keeps one,
    "user-0"... from --teacher, and any that the policy took by `Snapshot`."""
    temperature: float = 4.0
    weight: float = 0.5
    per_sample: bool = True
    """w_k(x) = softmax_k(-CE_k(x)/.5) if true, equal weights otherwise."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Collect statistics. Answer: SignalReader."""

    signals: frozenset[Signal]
    split: Split = "calibration"
    images: int = 1024
    fold: tuple[int, int] = (0, 1)
    """(k, n): only the k-th of n disjoint parts of those images."""
    gates: Gates | None = None
    blocks: tuple[str, ...] = ()
    """Blocks that are left out, as in `Remove`: of the network without them, refitted as `refit` says; not beside
    gates."""
    kernels: tuple[str, ...] = ()
    """Kernels that have one tap there, as in `Remove`; not beside gates."""
    refit: Refit = "none"


@dataclass(frozen=True, slots=True)
class Train:
    """Train the current model. Answer: Trained."""

    epochs: float
    lr: float | None = None
    """Peak learning rate; None is the run's --lr."""
    warmup: float = 0.15
    """Share of the steps with linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    start: float = 0.0
    """Where in the schedule this piece begins and ends (0..1): several pieces can share one cycle."""
    stop: float = 1.0
    gates: Gates | None = None
    decay: Gates | None = None
    """group -> (units,): extra decay rate of each unit's writing and reading weights, per step and lr."""
    within: Keep | None = None
    """Train inside the physically extracted sub-network; trained weights are mapped back."""
    distil: Distillation | None = None
    ema: float | None = None
    """Decay of a moving average of the weights, kept as the snapshot "ema"."""
    clip: float | None = None
    """Largest norm of all gradients of a step together, longer ones are shortened; the user's --clip-grad holds as
    well."""
    label: str = "train"
    """What the progress bar says."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Loss and accuracy, on the held-out part unless said otherwise; never on test. Answer: Evaluated."""

    split: Split = "holdout"
    gates: Gates | None = None
    within: Keep | None = None
    """Evaluate the extracted sub-network (refitted as `refit` says) and throw it away."""
    blocks: tuple[str, ...] = ()
    """Of the sub-network `within`: blocks that it does without, as in `Remove`."""
    kernels: tuple[str, ...] = ()
    """Of the sub-network `within`: kernels that have one tap, as in `Remove`."""
    refit: Refit = "none"
    recalibrate: bool = False
    """Re-estimate batch-norm statistics of the sub-network first."""
    model: str | None = None
    """Name of a snapshot to evaluate instead of the current model."""
    images: int | None = None
    """At most so many images of the split."""


@dataclass(frozen=True, slots=True)
class Grow:
    """Widen groups (Net2Wider), or let convolutions run as branches; function-preserving. Answer: Changed."""

    widths: Mapping[str, int]
    noise: float = 1e-2
    branches: tuple[str, ...] = ()
    """Kernels of the graph that become parallel linear branches, each with a norm of its own: all kinds that
    `Kernel.branches` names, blocks of the graph from then on. Costs go on being those of the merged kernels."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge all branches into the convolutions that they came from, exactly. Answer: Changed.

    A convolution without a branch that sees more than one tap is left with a 1 x 1 kernel.
    """


@dataclass(frozen=True, slots=True)
class Remove:
    """Physically remove everything but `keep`, and `blocks` as a whole. Answer: Changed."""

    keep: Keep
    gates: Gates | None = None
    """Last soft gates, folded into the reading weights."""
    refit: Refit = "none"
    survival: Gates | None = None
    """group -> (units,): probability that a kept unit goes next; the refit moves no weight onto it."""
    recalibrate: Literal["no", "yes", "if-better"] = "no"
    """Re-estimate batch-norm statistics; `if-better` keeps them only if the held-out loss falls."""
    images: int = 1024
    """Calibration images for refit and recalibration."""
    blocks: tuple[str, ...] = ()
    """Blocks of the graph that go: their input passes through. Branches go by the same word."""
    kernels: tuple[str, ...] = ()
    """Kernels of the graph that shrink to their centre tap."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Remember the current model under a name, as a teacher or for evaluation. Answer: None."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Numbers for the report and metrics.jsonl (temperatures, thresholds, probabilities). Answer: None."""

    kind: str
    values: Mapping[str, float | int | str | Sequence[float]] = field(default_factory=dict)


Directive = Measure | Train | Evaluate | Grow | Merge | Remove | Snapshot | Note


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training went."""

    loss: float
    """Mean training loss of the last epoch."""
    accuracy: float | None
    """Training accuracy of the last epoch, 0..1."""
    macs: float
    """Training MACs spent: 3 x forward per image, teachers' forward passes included."""
    steps: int
    least: float | None = None
    """Smallest mean loss of any of its epochs; None if the adapter does not tell."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    loss: float
    accuracy: float
    """Top-1, 0..1."""
    samples: int


@dataclass(frozen=True, slots=True)
class Verification:
    """Masked against pruned (law 1): the largest absolute difference and the scale of the outputs."""

    kind: Literal["exact", "skipped"]
    """`exact`: compared with the masked model, whose norms take statistics over the kept units."""
    max_error: float
    scale: float


@dataclass(frozen=True, slots=True)
class Changed:
    """The model after a growth, merge or removal."""

    graph: ChannelGraph
    """Units renumbered: the kept ones, in their old order."""
    plan: PruningPlan
    """Everything that has happened so far, in the coordinates of the original model."""
    verification: Verification
    refit_from: float | None = None
    """Held-out loss before recalibration was tried, if it was."""
    branched_macs: float | None = None
    """MACs of one forward pass of one image through all branches; None where there are none."""

    @property
    def forward_macs(self) -> float:
        """MACs of one forward pass of one image through the model as it runs."""
        return self.graph.cost().macs if self.branched_macs is None else self.branched_macs


Observation = SignalReader | Trained | Evaluated | Changed | None
