"""Convolutions whose kernels can shrink to one tap, and that can be searched in parallel branches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kernel:
    """A convolution whose k x k kernel can become its centre tap, a 1 x 1 kernel; stride and positions stay.

    What the other taps add is then gone: removed, they equal zeros.
    """

    name: str
    """The convolution; stable between runs and machines."""
    tensor: str
    """Its weight, (outputs, inputs, k, k)."""
    size: int
    """k, odd and more than 1."""
    branches: tuple[str, ...] = ()
    """Kinds of linear branches that can run beside it and be merged into it again (`Grow.branches`)."""

    @property
    def taps(self) -> int:
        return self.size**2

    @property
    def centre(self) -> int:
        """Index of the tap that stays, on both axes."""
        return self.size // 2
