"""Running statistics of batch norms that train: every rank sees samples of its own, all go on with the mean.

The mean of the ranks' running means is that of one process with the whole batch. Their variances lack the one
between the ranks' means, as everywhere that batch norms are not synchronised in the forward itself.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def trained_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that forwards in training change, live; counts of batches are equal on all ranks anyway."""
    return [
        buffer
        for child in module.modules()
        if isinstance(child, _BatchNorm) and any(p.requires_grad for p in child.parameters())
        for buffer in child.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


@torch.no_grad()
def average_over_ranks(statistics: list[Tensor]) -> None:
    """Each tensor becomes its mean over the ranks, all of them in one message."""
    if not statistics:
        return
    flat = torch.cat([tensor.flatten() for tensor in statistics]) / dist.get_world_size()
    dist.all_reduce(flat)
    means = flat.split([tensor.numel() for tensor in statistics])
    torch._foreach_copy_(statistics, [mean.view_as(t) for mean, t in zip(means, statistics, strict=True)])
