"""Between forward and update nothing is read back from the device: on a GPU that would wait for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snell_scale import loop
from snell_scale.config import Config
from snell_scale.run import run

# What copies a value to the host to decide something: .item(), bool(), torch.equal, sizes that depend on values.
_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"}


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in _READS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["lora", "snella", "gps"])
def test_a_step_reads_nothing_back(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, engine: str, method: str
) -> None:
    step, reads, num_steps = loop.optimizer_step, _Reads(), 0

    def watched(*args: Any, **settings: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        with reads:
            return step(*args, **settings)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    settings = ["training.clip_grad_norm=1.0", "training.gradient_accumulation=2", "training.ema_decay=0.9"]
    config = tiny(f"method.name={method}", f"engine.name={engine}", "logging.memory_at_step=null", *settings)
    assert run(config, quiet=True).status == "ok"
    assert num_steps == 8
    assert reads.seen == []
    with reads:
        torch.ones(()).item()
    assert reads.seen == ["aten::_local_scalar_dense"]
