"""The processes that work on one thing: what each of them does, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another rank has ended, or has not answered in time.

    Examples:
        >>> from narrowdeep.distributed import LostRankError
        >>> issubclass(LostRankError, RuntimeError)
        True
    """


@dataclass(frozen=True)
class Ranks:
    """This process among those of a group of torch.distributed; alone, unless made by ``of``.

    Every method but ``share`` is to be called on all ranks, in the same order.

    Examples:
        >>> import torch
        >>> from narrowdeep.distributed import Ranks
        >>> Ranks().share(10), Ranks(rank=1, size=3).share(10)
        (slice(0, 10, None), slice(3, 6, None))
        >>> Ranks().rows(3, lambda rows: torch.arange(3)[rows])
        tensor([0, 1, 2])
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """Of a process group, None for the default one; alone where torch.distributed is not in use."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` things in a row are this rank's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each by its sum over the ranks, the same bits on all of them.

        Raises: LostRankError.
        """
        if self.size > 1:
            self._call(lambda: [w.wait() for w in [self._all_reduce(t) for t in tensors]])

    def _all_reduce(self, tensor: Tensor) -> Any:
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def rows(self, count: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """All ``count`` rows, of which ``compute`` gives each rank those of its share."""
        own = compute(self.share(count))
        if self.size == 1:
            return own
        whole = own.new_zeros(count, *own.shape[1:])
        whole[self.share(count)] = own
        self.sum_(whole)
        return whole

    def any(self, flag: bool) -> bool:
        """Whether it is True on any rank. Raises: LostRankError."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        self.sum_(raised)
        return bool(raised.item())

    def all(self, value: T) -> list[T]:
        """What each rank gives, on all of them. Raises: LostRankError."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            self._call(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def first(self, value: T) -> T:
        """What the first rank gives. Raises: LostRankError."""
        return self.all(value)[0]

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raises: ValueError naming what differs from rank to rank, and how; LostRankError."""
        everywhere = self.all(dict(values))
        for rank, found in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if found.get(name) != value:
                    raise ValueError(
                        f"ranks must have the same {name}: rank 0 has {value!r}, rank {rank} has {found.get(name)!r}"
                    )

    @property
    def device(self) -> torch.device:
        """Where the group's backend takes tensors."""
        if self.size > 1 and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # of gloo; those of other backends are subclasses
            reason = str(error).partition("\n")[0]
            raise LostRankError(
                f"rank {self.rank} of {self.size} has lost the others, one of which has ended or does not answer: "
                f"{reason}"
            ) from error


ALONE = Ranks()
