"""launch/deepspeed.sh: two nodes of a hostfile, each started by hand, as where there is no ssh."""

import signal
import subprocess

import pytest

from tests.cluster.launched import STEPS, LaunchedRun, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # every wait below has a limit of its own


def start(run: LaunchedRun) -> list[subprocess.Popen[bytes]]:
    hostfile = run.root / "hosts"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    meeting = ("--hostfile", str(hostfile), "--no_ssh", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    return [run.start("deepspeed.sh", *meeting, f"--node_rank={node}", log=f"log.{node}") for node in (0, 1)]


def test_sigterm_saves_on_both_nodes_and_the_same_command_continues(
    launched: LaunchedRun, whole: LaunchedRun
) -> None:
    nodes = start(launched)
    launched.wait_for_step(15)
    nodes[1].send_signal(signal.SIGTERM)
    assert [node.wait(timeout=300) for node in nodes] == [75, 75]
    stopped = launched.result()
    assert stopped.status == "interrupted"
    launched.assert_no_process()

    assert [node.wait(timeout=300) for node in start(launched)] == [0, 0]
    result = launched.result()
    assert (result.world_size, result.steps, result.resumed_from_steps) == (2, STEPS, [stopped.steps])
    # The launcher is another, the engine (ddp) is not: the losses are equal bit by bit.
    assert launched.losses() == whole.losses()


def test_deepspeeds_own_engine_starts_under_it(launched: LaunchedRun) -> None:
    run = LaunchedRun(launched.root, ("engine.name=deepspeed", "engine.zero_stage=1", "training.steps=8"))
    assert [node.wait(timeout=300) for node in start(run)] == [0, 0], (run.root / "log.0").read_text()
    assert (run.result().status, run.result().engine, run.result().world_size) == ("ok", "deepspeed zero-1", 2)
