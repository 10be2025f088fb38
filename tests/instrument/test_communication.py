"""CommunicationCounter against sizes known beforehand, on two processes; every comparison is exact."""

import json
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from snell_scale.instrument.communication import _COLLECTIVES, _NAMESPACES, _WITHOUT_PAYLOAD
from tests.instrument import communication_cases
from tests.instrument.communication_cases import ODD, WIDTH, make_model
from tests.spawned import WORLD_SIZE, free_ports, run_ranks

Found: TypeAlias = list[dict[str, Any]]

SECONDS = 150  # they take 15; DeepSpeed's first use on a machine compiles for half a minute

# name → (operation, payload bytes, bytes on the wire per rank), of ten float32 where the name says nothing.
RAW = {
    "all_reduce": ("all_reduce", 40, 40),
    "all_reduce, bf16, async": ("all_reduce", 20, 20),
    "all_reduce of 3 and 4, coalesced": ("all_reduce", 28, 28),
    "all_gather into a list": ("all_gather", 80, 40),
    "all_gather into a tensor": ("all_gather", 80, 40),
    "reduce_scatter": ("reduce_scatter", 40, 20),
    "reduce_scatter of a list": ("reduce_scatter", 80, 40),
    "broadcast": ("broadcast", 40, 20),
    "reduce": ("reduce", 40, 20),
    "all_to_all": ("all_to_all", 40, 20),
    "gather": ("gather", 80, 20),
    "scatter": ("scatter", 80, 20),
    "a group of one": ("all_reduce", 40, 0),
    "DTensor partial to replicated": ("all_reduce", 40, 40),
    "DTensor partial to sharded": ("reduce_scatter", 40, 20),
    "DTensor sharded to whole": ("all_gather", 80, 40),
    "DTensor operator": ("all_reduce", 40, 40),
    "a thread of autograd": ("all_reduce", 40, 40),
}
_POINT_TO_POINT = {
    *("c10d::send", "c10d::recv_", "c10d::recv_any_source_"),
    *("_c10d_functional::isend", "_c10d_functional::irecv", "_c10d_functional::batch_p2p_ops"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of the two ranks counted."""
    folder = tmp_path_factory.mktemp("communication")
    run_ranks(communication_cases.run, folder, *free_ports(1), seconds=SECONDS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize("name", RAW)
def test_a_collective(found: Found, name: str, rank: int):
    operation, payload, wire = RAW[name]
    assert found[rank]["raw"][name] == {
        "world_size": WORLD_SIZE,
        "operations": {operation: {"calls": 1, "payload_bytes": payload}},
        "payload_bytes": payload,
        "wire_bytes_per_rank": wire,
    }


@pytest.mark.parametrize("name", ["barrier", "objects on the control group", "all_reduce on the control group"])
def test_what_hosts_tell_each_other_is_no_traffic(found: Found, name: str):
    report = found[0]["raw"][name]
    assert report["operations"] == {}
    assert report["payload_bytes"] == report["wire_bytes_per_rank"] == 0


def test_the_cases_are_all_asserted(found: Found):
    assert len(found[0]["raw"]) == len(RAW) + 3


def test_an_unknown_operation_is_named(found: Found):
    nothing = {"world_size": WORLD_SIZE, "operations": {}, "payload_bytes": 0, "wire_bytes_per_rank": 0}
    assert found[0]["uncounted"] == {**nothing, "uncounted_operations": ["c10d::send"]}
    assert found[1]["uncounted"] == {**nothing, "uncounted_operations": ["c10d::recv_"]}


def test_ddp_reduces_the_trainable_gradients(found: Found):
    """A block's bias and weight are far below the size of a bucket, so there is one call."""
    payload = _bytes(make_model(), trainable=True)
    assert _operations(found, "ddp") == {"all_reduce": {"calls": 1, "payload_bytes": payload}}


def test_fsdp2_pads_rows_to_the_number_of_ranks(found: Found):
    model = make_model(ODD)
    padded_rows = ODD + 1
    padding = 2 * 4 * (padded_rows - ODD) * (WIDTH + 1)  # two blocks, float32, a row of the weight and the bias
    assert _operations(found, "fsdp2, odd rows") == {
        "all_gather": {"calls": 4, "payload_bytes": 2 * (_bytes(model) + padding)},
        "reduce_scatter": {"calls": 2, "payload_bytes": _bytes(model, trainable=True) + padding},
    }


def test_zero_2_reduces_the_trainable_gradients_and_gathers_the_trainable_weights(found: Found):
    """As this DeepSpeed does it: gradients all-reduced whole, and the gradients' norm, one float32."""
    payload = _bytes(make_model(), trainable=True)
    assert _operations(found, "zero-2") == {
        "all_gather": {"calls": 1, "payload_bytes": payload},
        "all_reduce": {"calls": 2, "payload_bytes": payload + 4},
    }


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_frozen_weights_are_only_gathered_by_fsdp2(found: Found, num_frozen: int):
    """Two blocks, each gathered in forward and in backward, and reduced once; every size divides by the ranks."""
    model = make_model(num_frozen=num_frozen)
    assert _operations(found, f"fsdp2, {num_frozen} frozen") == {
        "all_gather": {"calls": 4, "payload_bytes": 2 * _bytes(model)},
        "reduce_scatter": {"calls": 2, "payload_bytes": _bytes(model, trainable=True)},
    }


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_frozen_weights_are_only_gathered_by_zero_3(found: Found, num_frozen: int):
    """Layer by layer, in forward and in backward; not in the backward that the first frozen layers do not have.

    The all_reduce is of the gradients' norm, one float64.
    """
    model = make_model(num_frozen=num_frozen)
    num_layers = len(list(model.parameters())) // 2  # of a weight and a bias each
    first_bytes = num_frozen * 4 * WIDTH * (WIDTH + 1)
    assert _operations(found, f"zero-3, {num_frozen} frozen") == {
        "all_gather": {
            "calls": 2 * num_layers - num_frozen,
            "payload_bytes": 2 * _bytes(model) - first_bytes,
        },
        "all_reduce": {"calls": 1, "payload_bytes": 8},
        "reduce_scatter": {"calls": 1, "payload_bytes": _bytes(model, trainable=True)},
    }


def test_counting_changes_no_loss_and_leaves_nothing_behind(found: Found):
    for rank in found:
        assert rank["counted losses"] == rank["uncounted losses"]
        assert not rank["modes left"]


@pytest.mark.parametrize("order", ["probe inside", "counter inside"])
def test_the_counter_and_the_memory_probe_nest(found: Found, order: str):
    ddp, fsdp2 = found[0]["nested"]["ddp"], found[0]["nested"]["fsdp2"]
    assert ddp[order] == ddp["alone"]
    assert fsdp2[order]["communication"] == fsdp2["alone"]["communication"]
    # Here gloo's threads free what they sent when they come to it, so only what stands is the same every time.
    measured, alone = fsdp2[order]["memory"], fsdp2["alone"]["memory"]
    for category in ("parameters_bytes", "optimizer_bytes"):
        assert measured["backward"][category] == alone["backward"][category] > 0
    # The whole weights are gathered into a buffer, and gradients summed in one.
    assert all(measured[phase]["communication_bytes"] > 0 for phase in ("forward", "backward"))


def test_every_collective_of_this_torch_is_known():
    schemas = [torch._C._get_schema(name, "") for name in _default_operators()]
    of_a_group = {
        schema.name
        for schema in schemas
        if {"process_group", "group_name"} & {argument.name for argument in schema.arguments}
    }
    assert of_a_group - _POINT_TO_POINT == {*_COLLECTIVES, *_WITHOUT_PAYLOAD}
    for schema in schemas:
        if schema.name in _COLLECTIVES:
            assert _COLLECTIVES[schema.name].argument in {argument.name for argument in schema.arguments}


def _default_operators() -> list[str]:
    return [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.partition("::")[0] in _NAMESPACES and "." not in name
    ]


def _operations(found: Found, name: str) -> dict[str, Any]:
    first, second = (rank["steps"][name]["operations"] for rank in found)
    assert first == second
    return first


def _bytes(module: nn.Module, *, trainable: bool = False) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad or not trainable)
