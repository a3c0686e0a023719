"""Which of several processes this one is, as launchers (torchrun, accelerate, Slurm scripts) say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from prunus.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a process in its job."""

    rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """The first process runs the method and writes the folder; the others do as it says."""
        return self.rank == 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """From the launcher's variables RANK and WORLD_SIZE. Raises ConfigError if they make no sense."""
        rank, count = environment.get("RANK"), environment.get("WORLD_SIZE")
        if rank is None or count is None:
            return cls()
        if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
            raise ConfigError(
                f"the environment says RANK={rank} and WORLD_SIZE={count}; a rank is a number from 0 up to the "
                "number of processes. Start several processes by torchrun or accelerate launch, or unset both"
            )
        return cls(int(rank), int(count))
