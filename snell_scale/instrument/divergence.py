"""Notices a loss or gradient that is not finite, on the device, and says where it began."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOST_NAMES = 5


@dataclass(frozen=True)
class Divergence:
    """Where a run stopped being finite: `step` is 1-based; groups are the optimizer's named groups."""

    step: int
    loss: float
    groups: tuple[str, ...]
    parameters: tuple[str, ...]

    def describe(self) -> str:
        where = ", ".join(self.groups) or "none: the loss itself"
        names = f" ({', '.join(self.parameters)})" if self.parameters else ""
        return (
            f"the loss or a gradient stopped being finite at step {self.step} (loss {self.loss}); parameter "
            f"groups with such gradients: {where}{names}. Lower training.lr, or set training.clip_grad_norm"
        )


class DivergenceWatch:
    """Keeps, without a host sync, the first step whose loss or gradient norms were not finite."""

    def __init__(self) -> None:
        self._first_step: Tensor | None = None
        self._loss: Tensor | None = None
        self._norms: Tensor | None = None

    def observe(self, step: int, loss: Tensor, group_norms: Tensor, *, norms_matter: bool) -> None:
        """Take in one step: 0-d loss, (groups,) gradient norms. Under loss scaling the norms do not matter."""
        bad = ~torch.isfinite(loss)
        if norms_matter:
            bad = bad | ~torch.isfinite(group_norms).all()
        if self._first_step is None or self._loss is None or self._norms is None:
            self._first_step = torch.where(bad, step, -1)
            self._loss, self._norms = loss.clone(), group_norms.clone()
            return
        first_time = bad & (self._first_step < 0)
        self._first_step = torch.where(first_time, step, self._first_step)
        self._loss = torch.where(first_time, loss, self._loss)
        self._norms = torch.where(first_time, group_norms, self._norms)

    def read(self, norm_names: Sequence[str], module: nn.Module) -> Divergence | None:
        """What was noticed so far, or None. Reads the device: a host sync on a GPU.

        Of parameters that are sharded this rank names those whose own part is not finite.
        """
        if self._first_step is None or self._loss is None or self._norms is None or self._first_step.item() < 0:
            return None
        finite = torch.isfinite(self._norms).tolist()
        broken = [name for name, p in module.named_parameters() if p.requires_grad and not _all_finite(p)]
        return Divergence(
            step=int(self._first_step.item()),
            loss=self._loss.item(),
            groups=tuple(name for name, ok in zip(norm_names, finite, strict=True) if not ok),
            parameters=tuple(broken[:_MOST_NAMES]),
        )


def _all_finite(tensor: Tensor) -> bool:
    tensor = tensor.detach()
    own = getattr(tensor, "to_local", lambda: tensor)()  # of a sharded one (DTensor)
    return bool(torch.isfinite(own).all())
