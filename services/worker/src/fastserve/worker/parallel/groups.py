"""Which rank this process is, and where it stands in its group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.common.errors import StartupError


class GroupLost(Exception):
    """A rank of the group is gone: this process ends too, and all of them start anew."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks are numbered stage after stage: rank = stage * tp + index."""

    rank: int
    tp: int
    pp: int
    local_rank: int
    one_host: bool
    address: str
    port: int

    @property
    def size(self) -> int:
        return self.tp * self.pp

    @property
    def index(self) -> int:
        """Which tensor parallel shard."""
        return self.rank % self.tp

    @property
    def stage(self) -> int:
        """Which pipeline stage."""
        return self.rank // self.tp

    @property
    def last(self) -> bool:
        """Whether this is of the last stage, which has the head."""
        return self.stage == self.pp - 1

    @property
    def ends(self) -> range:
        """The ranks of the last stage."""
        return range((self.pp - 1) * self.tp, self.size)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], tp: int, pp: int) -> Group:
        """From the variables that torchrun sets. Raises `StartupError` if they make no sense."""
        try:
            rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
            local = int(environ["LOCAL_RANK"])
            local_world = int(environ.get("LOCAL_WORLD_SIZE", "1"))
            address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except KeyError as error:
            raise StartupError(f"RANK is set, but {error.args[0]} is not") from error
        except ValueError as error:
            raise StartupError(f"the environment of a rank makes no sense: {error}") from error
        if world != tp * pp:
            raise StartupError(f"WORLD_SIZE is {world}, but {tp} x {pp} ranks were asked for")
        if not 0 <= rank < world:
            raise StartupError(f"RANK {rank} is not one of {world}")
        return cls(rank, tp, pp, local, local_world == world, address, port)
