"""MemoryProbe agrees with two other counts of live memory, and neither disturbs nor keeps anything."""

import gc
import json
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from snell_scale.instrument.memory import MemoryProbe
from snell_scale.records import MEMORY_CATEGORIES
from tests.instrument.memory_cases import (
    ADAMW_BYTES,
    BATCH_BYTES,
    HIDDEN_BYTES,
    MLP_BYTES,
    NUM_IMAGES,
    Blocks,
    make_batch,
    make_mlp,
    measure,
    no_phase,
    split,
    train_step,
)


class PolledStorages(TorchDispatchMode):
    """Another count: C++ weak references to all storages ever seen, all polled after every operator."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0
        self.add(standing)

    def add(self, tree: Any) -> None:
        for tensor in tree_leaves(list(tree)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self.storages.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add([args, kwargs])
        result = func(*args, **(kwargs or {}))
        self.add([result])
        return result


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_second_count_of_live_storages_agrees(use_reentrant: bool | None):
    module, batch = Blocks(use_reentrant), make_batch(8).requires_grad_()
    report, optimizer = measure(module, batch, num_warmup_steps=1)
    batch.grad = None
    state = [value for values in optimizer.state.values() for value in values.values()]
    with PolledStorages([*module.parameters(), *state]) as other:
        train_step(module, optimizer, batch, phase=no_phase)
    assert report["peak"]["total_bytes"] == other.peak_bytes


def test_the_allocator_agrees(tmp_path: Path):
    """torch's own account of what it allocated, by the profiler; none of these operators has a work space."""
    module, batch = make_mlp(), make_batch()
    report, optimizer = measure(module, batch, num_warmup_steps=1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        train_step(module, optimizer, batch, phase=no_phase)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [event for event in trace if event["name"] == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    allocated = max(event["args"]["Total Allocated"] for event in events) - before
    standing = MLP_BYTES + ADAMW_BYTES + BATCH_BYTES
    assert report["peak"]["total_bytes"] == standing + allocated


def test_training_results_are_bit_identical():
    def train(num_probed_steps: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        module, batch = Blocks(False), make_batch(8)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        probe = MemoryProbe(module, optimizer)
        losses = []
        for step in range(6):
            is_probed = step < num_probed_steps
            with probe if is_probed else nullcontext():
                phase = probe.phase if is_probed else no_phase
                losses.append(train_step(module, optimizer, batch, phase=phase))
        return losses, [p.detach() for p in module.parameters()]

    plain, probed = train(0), train(4)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], probed[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[1], probed[1], strict=True))
    assert plain[0][-1] != plain[0][0]


def test_nothing_is_kept_alive():
    module, batch = make_mlp(), make_batch()
    optimizer = torch.optim.AdamW(module.parameters())
    ema = [p.detach().clone() for p in module.parameters()]
    probe = MemoryProbe(module, optimizer, extra={"optimizer": ema})
    with probe:
        with probe.phase("forward"):
            outputs = module(batch)
        with probe.phase("backward"):
            outputs.sum().backward()
        with probe.phase("step"):
            optimizer.step()
    tensors = [*module.parameters(), *ema, batch, outputs]
    references: list[weakref.ref[Any]] = [weakref.ref(t.untyped_storage()) for t in tensors]
    references += [weakref.ref(module), weakref.ref(optimizer)]
    del module, optimizer, ema, batch, outputs, tensors
    gc.collect()
    assert [reference for reference in references if reference() is not None] == []
    # The probe outlives them, and can still be asked and even used.
    with probe, probe.phase("nothing"):
        pass
    assert probe.report()["phases"]["nothing"]["total_bytes"] == 0


def test_a_result_saved_by_its_own_node_dies_with_its_last_reference():
    module = nn.Linear(4, 4)
    probe = MemoryProbe(module)
    with probe, probe.phase("forward"):
        result = module(make_batch()).exp()
        reference = weakref.ref(result.untyped_storage())
        del result
        assert reference() is None


def test_no_hook_is_left_behind():
    module, batch = make_mlp(), make_batch()
    optimizer = torch.optim.AdamW(module.parameters())
    probe = MemoryProbe(module, optimizer)
    with probe:
        train_step(module, optimizer, batch, phase=probe.phase)
    report = probe.report()
    for part in module.modules():
        for name in ("forward", "forward_pre", "backward", "backward_pre"):
            assert not getattr(part, f"_{name}_hooks")
    for parameter in module.parameters():
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert _get_current_dispatch_mode() is None
    assert not probe._ledger._entries
    # An unprobed step is not seen at all: neither by an operator nor by the release of a storage.
    train_step(module, optimizer, batch, phase=no_phase)
    assert not any(probe._ledger.live.values())
    assert probe.report()["phases"] == report["phases"]


def test_backward_after_the_probe_has_ended():
    module, batch = Blocks(False), make_batch(8)
    expected = torch.autograd.grad(module(batch).square().sum(), list(module.parameters()))
    probe = MemoryProbe(module)
    with probe, probe.phase("forward"):
        loss = module(batch).square().sum()
    actual = torch.autograd.grad(loss, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_failed_phase_is_recorded_up_to_the_failure():
    module, batch = make_mlp(), make_batch()
    probe = MemoryProbe(module)

    def fail_after_forward() -> None:
        with probe, probe.phase("forward"):
            module(batch)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_after_forward()
    assert probe.report()["phases"]["forward"]["activations_bytes"] == BATCH_BYTES + HIDDEN_BYTES
    with probe, probe.phase("forward"):
        module(batch)


def test_compiled_code_stays_compiled_and_its_saved_tensors_are_seen():
    module, batch = Blocks(None), make_batch(8)
    num_compilations, num_runs = 0, 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal num_compilations
        num_compilations += 1

        def run(*inputs: Tensor) -> Any:
            nonlocal num_runs
            num_runs += 1
            return graph.forward(*inputs)

        return run

    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend)
    loss = compiled(batch).sum()
    loss.backward()
    module.zero_grad()
    probe = MemoryProbe(module)
    with probe:
        with probe.phase("forward"):
            probed_loss = compiled(batch).sum()
        with probe.phase("backward"):
            probed_loss.backward()
    torch.compiler.reset()
    assert num_compilations == 1
    assert num_runs == 2
    assert torch.equal(loss, probed_loss)
    forward = probe.report()["phases"]["forward"]
    # Four inputs of 8 and two hidden tensors of 32 features per block, nothing else saved.
    assert forward["activations_bytes"] == 4 * NUM_IMAGES * (8 + 2 * 32) * 4


def test_on_cuda_the_allocator_has_the_last_word(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 8000)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"active_bytes.all.peak": 5600})
    monkeypatch.setattr("snell_scale.instrument.nvml.used_bytes", lambda _: None)
    probe = MemoryProbe(make_mlp())
    probe.device = torch.device("cuda", 0)
    seen = {"parameters": 1000, "gradients": 500, "optimizer": 700, "activations": 800, "temporary": 100}
    entry = probe._entry(dict.fromkeys(MEMORY_CATEGORIES, 0) | seen, peak=True)
    assert split(entry) == {**seen, "unexplained": 5000 - 3100}
    assert entry["total_bytes"] == entry["allocated_bytes"] == 5000
    assert entry["active_bytes"] == 5600
    assert entry["reserved_bytes"] == 8000
    assert entry["nvml_used_bytes"] is None


def test_misuse_is_named():
    module = make_mlp()
    with pytest.raises(ValueError, match="unknown categories"):
        MemoryProbe(module, extra={"weights": []})
    wrong: Any = "AdamW"
    with pytest.raises(ValueError, match="expected a torch.optim.Optimizer"):
        MemoryProbe(module, wrong)
    probe = MemoryProbe(module)
    with pytest.raises(ValueError, match="outside of the probe"), probe.phase("forward"):
        pass
    with probe, pytest.raises(ValueError, match="already active"), probe:
        pass
    with probe, pytest.raises(ValueError, match="another name"), probe.phase("load"):
        pass
    outer = probe.phase("forward")
    with probe, outer, pytest.raises(ValueError, match='inside phase "forward"'), probe.phase("backward"):
        pass
