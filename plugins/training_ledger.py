"""What a search has spent, in MACs, against what it may spend.

The allowance is `epochs` x the cost of one epoch of the *original* network: 3 x its forward MACs x images.
What counts: training (3 forwards per image, teachers' forwards included, as `Trained.macs` says), and the
search's evaluations, refits and gradients on held-out images. The one pass in which a round measures its energies
does not: it is as long as a refit's, and no other method is charged for its own.
"""

from __future__ import annotations

from collections.abc import Generator

from prunus.core.cost import Cost
from prunus.core.directives import Directive, Observation, Train, Trained
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph


class TrainingLedger:
    """Counts in MACs; how many images an epoch has is learned from the first training."""

    def __init__(
        self, epochs: float, original: Cost, held_out: int | None = None, calibration: int | None = None
    ) -> None:
        """`held_out`, `calibration`: images that there are; None for as many as are asked for."""
        self._held_out, self._calibration = held_out, calibration
        self._epochs, self._forward = epochs, max(original.macs, 1.0)
        self._images_per_epoch: float | None = None
        self.trained = 0.0
        self.searched = 0.0

    def train(self, graph: ChannelGraph, directive: Train) -> Generator[Directive, Observation, None]:
        """Carry out a training and enter it. Nothing happens once the allowance is used up."""
        if directive.epochs <= 0:
            return
        answer = yield directive
        if not isinstance(answer, Trained):
            raise PluginError("joint-search", "Train is answered by Trained", repr(type(answer).__name__))
        if self._images_per_epoch is None:
            self._images_per_epoch = answer.macs / (3.0 * max(graph.cost().macs, 1.0) * directive.epochs)
        self.trained += answer.macs

    def epochs_left(self, graph: ChannelGraph, factor: float = 1.0) -> float:
        """Epochs that `graph` can still be trained; `factor` is 1 plus the teachers' share."""
        if self._images_per_epoch is None:
            return self._epochs
        per_epoch = 3.0 * max(graph.cost().macs, 1.0) * self._images_per_epoch * factor
        return max(0.0, (self._allowance - self.trained - self.searched) / per_epoch)

    def add_forward(self, graph: ChannelGraph, images: int) -> None:
        self.searched += graph.cost().macs * images

    def add_backward(self, graph: ChannelGraph, images: int) -> None:
        """Gradients on `images` of the held-out part, or on what there is."""
        self.searched += 3.0 * graph.cost().macs * _at_most(images, self._held_out)

    def add_refit(self, before: ChannelGraph, after: ChannelGraph, images: int) -> None:
        """A sequential refit sees every image by both networks: `images` of the calibration part."""
        self.searched += (before.cost().macs + after.cost().macs) * _at_most(images, self._calibration)

    @property
    def search_share(self) -> float:
        """What the search's own forward passes took of the allowance, 0..1."""
        return self.searched / max(self._allowance, 1.0)

    @property
    def _allowance(self) -> float:
        return 3.0 * self._forward * (self._images_per_epoch or 0.0) * self._epochs

    def summary(self) -> dict[str, float]:
        """In epochs of the original network."""
        epoch = 3.0 * self._forward * max(self._images_per_epoch or 0.0, 1.0)
        return {
            "allowed_epochs": self._epochs,
            "trained_epochs": self.trained / epoch,
            "searched_epochs": self.searched / epoch,
            "macs": self.trained + self.searched,
        }


def _at_most(images: int, there_are: int | None) -> int:
    return images if there_are is None else min(images, there_are)
