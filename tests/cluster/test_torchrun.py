"""launch/torchrun.sh: two agents as two nodes, crashes, signals, and the exit codes behind torchrun's."""

import contextlib
import os
import signal

import pytest

from tests.cluster.launched import CHECKPOINT_EVERY, STEPS, LaunchedRun, environment_of, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # every wait below has a limit of its own


def two_nodes(run: LaunchedRun) -> list[int]:
    """Exit codes of the run started once for each of two nodes; rank 1 is killed once on the way."""
    meeting = ("--nodes", "2", "--nproc-per-node", "1", "--rendezvous", f"127.0.0.1:{free_port()}")
    nodes = [run.start("torchrun.sh", *meeting, log=f"log.{node}") for node in (0, 1)]
    run.wait_for_step(25)
    os.kill(run.worker(1), signal.SIGKILL)
    return [node.wait(timeout=300) for node in nodes]


def test_a_killed_rank_is_restarted_on_two_nodes(launched: LaunchedRun, whole: LaunchedRun) -> None:
    assert two_nodes(launched) == [0, 0]
    result = launched.result()
    assert (result.status, result.world_size, result.steps) == ("ok", 2, STEPS)
    (resumed_from,) = result.resumed_from_steps
    assert resumed_from >= 20
    assert resumed_from % CHECKPOINT_EVERY == 0  # from the newest checkpoint, which nobody made while dying
    # Bit by bit: the restarted ranks do what the killed ones would have done.
    assert launched.losses() == whole.losses()
    assert result.metrics == whole.result().metrics
    launched.assert_no_process()


def test_sigterm_saves_and_the_same_command_continues(launched: LaunchedRun, whole: LaunchedRun) -> None:
    launcher = launched.start("torchrun.sh", "--nproc-per-node", "2")
    launched.wait_for_step(15)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=300) == 75
    stopped = launched.result()
    assert stopped.status == "interrupted"
    assert 15 <= stopped.steps < STEPS
    launched.assert_no_process()

    assert launched.start("torchrun.sh", "--nproc-per-node", "2").wait(timeout=300) == 0
    assert launched.result().resumed_from_steps == [stopped.steps]
    assert launched.losses() == whole.losses()


def test_sigusr2_stops_the_workers_and_spares_the_rest(launched: LaunchedRun) -> None:
    launcher = launched.start("torchrun.sh", "--nproc-per-node", "2", "--interrupted-code", "143")
    launched.wait_for_step(5)
    for pid in launched.processes():  # as a batch system does, which knows no rank
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    assert launcher.wait(timeout=300) == 143
    assert launched.result().status == "interrupted"


def test_ctrl_c_saves(launched: LaunchedRun) -> None:
    launcher = launched.start("torchrun.sh", "--nproc-per-node", "2")
    launched.wait_for_step(5)
    # A terminal's goes to the launcher's own process group, of which torchrun and the workers are no part.
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=300) == 75
    assert launched.result().status == "interrupted"


@pytest.mark.parametrize(
    ("setting", "code", "expected"),
    [("training.lr=1e20", 4, "diverged"), ("training.stepz=3", 2, "unknown key")],
)
def test_what_would_end_the_same_way_is_not_restarted(
    launched: LaunchedRun, setting: str, code: int, expected: str
) -> None:
    run = LaunchedRun(launched.root, (setting,))
    assert run.start("torchrun.sh", "--nproc-per-node", "2").wait(timeout=300) == code
    log = (run.root / "log").read_text()
    assert expected in log
    assert "Restarting" not in log
    assert "worker group" not in log


def test_a_crash_at_every_start_ends_after_the_restarts(launched: LaunchedRun) -> None:
    launcher = launched.start("torchrun.sh", "--nproc-per-node", "1", "--max-restarts", "1")
    for _ in range(2):
        launched.wait_for_step(1)
        # In a store that outlives a crash, a restarted process may meet one that is no more: it may hang.
        assert "TORCHELASTIC_USE_AGENT_STORE=False" in environment_of(launched.worker(0))
        os.kill(launched.worker(0), signal.SIGKILL)
        (launched.folder / "steps.jsonl").unlink()
    assert launcher.wait(timeout=300) == 1
    assert not (launched.folder / "result.json").exists()
