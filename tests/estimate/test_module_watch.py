"""The name of the module that runs, forward and backward, without keeping anything alive for it."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.module_tracker import ModuleTracker

from snell_scale.estimate.module_watch import ModuleWatch
from tests.kernels.live_bytes import LiveBytes

WIDTH, NUM_ROWS, NUM_BLOCKS = 32, 256, 4


class Seen(torch.autograd.Function):
    """Hands its input on, and notes where it is called, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[str], None]) -> Tensor:
        ctx.note = note
        note("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.note("backward")
        return gradients[0], None


class Inner(nn.Module):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Seen.apply(x, self.note)).relu().square()


class Model(nn.Module):
    """Blocks in a row, recomputed in backward where asked for."""

    def __init__(self, note: Callable[[str], None] = lambda _: None, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner(note) for _ in range(NUM_BLOCKS))
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)  # pyright: ignore
        return x.sum()


def _places(*, checkpoints: bool) -> list[tuple[str, str | None]]:
    noted: list[tuple[str, str | None]] = []
    model = Model(lambda phase: noted.append((phase, watch.place())), checkpoints=checkpoints)
    watch = ModuleWatch(model)
    x = torch.ones(NUM_ROWS, WIDTH, requires_grad=True)
    with watch:
        assert watch.place() is None
        loss = model(x)
        assert watch.place() is None
        loss.backward()
    return noted


def test_every_block_is_named_forward_and_backward() -> None:
    names = [f"blocks.{number}" for number in range(NUM_BLOCKS)]
    noted = _places(checkpoints=False)
    assert noted[:NUM_BLOCKS] == [("forward", name) for name in names]
    # A backward within block n comes after that of its linear layer, whose gradient was the last to be reached.
    assert noted[NUM_BLOCKS:] == [("backward", f"{name}.linear") for name in reversed(names)]


def test_what_is_recomputed_in_backward_is_named_too() -> None:
    """A recomputation is broken off once it has what it needs: the names after it are right all the same."""
    names = [f"blocks.{number}" for number in range(NUM_BLOCKS)]
    noted = _places(checkpoints=True)
    in_backward = [(phase, name) for name in reversed(names) for phase in ("forward", "backward")]
    assert [(phase, (name or "").removesuffix(".linear")) for phase, name in noted[NUM_BLOCKS:]] == in_backward


def test_an_error_in_a_module_leaves_no_hook_and_no_name() -> None:
    model = Model()
    watch = ModuleWatch(model)
    with watch:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(1, WIDTH + 1))
        assert watch.place() is None
        model(torch.ones(1, WIDTH))
        assert watch.place() is None
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    assert all(len(each) == 0 for each in hooks)


def test_modules_of_another_model_have_no_place() -> None:
    noted: list[str | None] = []
    watched = Model()
    watch = ModuleWatch(watched)
    with watch:
        Model(lambda _: noted.append(watch.place()))(torch.ones(1, WIDTH))
    assert noted == [None] * NUM_BLOCKS


def _peak(watch: Callable[[nn.Module], AbstractContextManager[object]], *, checkpoints: bool) -> int:
    model = Model(checkpoints=checkpoints)
    x = torch.ones(NUM_ROWS, WIDTH, requires_grad=True)
    with LiveBytes([x, *model.parameters()]) as live, watch(model):
        model(x).backward()
    return live.peak


@pytest.mark.parametrize("checkpoints", [False, True])
def test_nothing_is_kept_alive(checkpoints: bool) -> None:
    unwatched = _peak(lambda _: contextlib.nullcontext(), checkpoints=checkpoints)
    assert _peak(ModuleWatch, checkpoints=checkpoints) == unwatched


def test_torchs_tracker_keeps_what_is_recomputed() -> None:
    """Why there is a watch of our own: once this fails, torch's could take its place."""
    unwatched = _peak(lambda _: contextlib.nullcontext(), checkpoints=True)
    assert _peak(lambda _: ModuleTracker(), checkpoints=True) > unwatched
