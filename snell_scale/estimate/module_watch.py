"""Which module runs, forward or backward, without keeping a tensor alive that would not be without it.

torch.utils.module_tracker.ModuleTracker hooks tensors, and with activation checkpointing all that is recomputed
stays alive until backward has ended: a count of memory beside it is wrong by that.
"""

from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves


class ModuleWatch:
    """While its with-block lasts, `place()` names the innermost module of `root` that runs; None outside of all.

    In backward it is the last one whose output's gradient was reached.
    """

    def __init__(self, root: nn.Module) -> None:
        self._names = {id(module): name for name, module in root.named_modules() if name}
        self._running: list[str] = []
        self._reached: str | None = None

    def place(self) -> str | None:
        return self._running[-1] if self._running else self._reached

    def __enter__(self) -> "ModuleWatch":
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            # A recomputation is broken off as soon as it has what it needs.
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._running.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        while self._running and self._running.pop() != name:
            pass
        given = {id(leaf) for leaf in tree_leaves(args)}
        for leaf in tree_leaves(output):
            if id(leaf) in given:  # an Identity computes nothing
                continue
            node = getattr(leaf, "grad_fn", None)
            if node is not None:
                node.register_prehook(lambda _: self._reach(name))

    def _reach(self, name: str) -> None:
        self._reached = name
