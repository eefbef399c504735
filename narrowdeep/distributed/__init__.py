"""More than one process: networks in stages, what is gathered from all ranks, kernels tile by tile.

torch.distributed runs it all, as it is: ``torch.distributed.pipelining``, ``DistributedDataParallel``,
``torch.distributed.fsdp.fully_shard`` and ``torch.distributed.checkpoint`` take what is made here.
"""

from narrowdeep.distributed.gathered import gather
from narrowdeep.distributed.ranks import LostRankError, Ranks
from narrowdeep.distributed.stage import Stage, stages
from narrowdeep.distributed.system import solve
from narrowdeep.distributed.tiles import write_features, write_kernel

__all__ = ["LostRankError", "Ranks", "Stage", "gather", "solve", "stages", "write_features", "write_kernel"]
