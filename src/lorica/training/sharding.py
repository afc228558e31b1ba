"""A frozen base model whose weights several processes hold in parts (FSDP)."""

from __future__ import annotations

import os

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lorica.adapters.branches import blocks_of
from lorica.processes import Processes


def is_asked_for() -> bool:
    """Whether accelerate is set up for FSDP, which its launcher says in the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: nn.Module, processes: Processes) -> None:
    """Leave each process its part of every block's weights; a block is whole only while it runs.

    What is laid on the model afterwards, and what lies outside the blocks, stays whole in every process. Every process
    must run the model whenever one does.
    """
    from torch.distributed.fsdp import fully_shard  # a second to import, which a verb that loads no model need not pay

    mesh = init_device_mesh(next(model.parameters()).device.type, (processes.num,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
