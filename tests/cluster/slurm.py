"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, as root."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.launched import environment
from tests.cluster.waiting import wait_for

NODES = ("n1", "n2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# In the environment of a node's daemons; its jobs have SLURMD_NODENAME.
_MARK = "TEST_CLUSTER_NODE"
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job is queued again after this time, 120 seconds by default.
AuthInfo=socket={munge}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
# A node that says nothing for so long is lost; a busy machine's daemons may need some of it.
SlurmdTimeout=20
KillWait=30
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing_programs() -> list[str]:
    """What `make test-cluster` installs and this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]


@dataclass
class Cluster:
    """The daemons of a running cluster, and the commands that the tests give it."""

    folder: Path
    environment: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """The output of a SLURM command; its failure is raised with what it said."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, ExitCode, Restarts, …"""
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", number, "--oneliner")))

    def node_state(self, name: str) -> str:
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "node", name)))["State"]

    def start_node(self, name: str) -> None:
        # -D: in the foreground, so that it is ours to end.
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def lose_node(self, name: str) -> None:
        """The node's daemon and all that runs on it die at once, as when its power goes."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in _processes_of(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge}/munge.socket", *files)
        wait_for(lambda: (munge / "munge.socket").exists(), seconds=20, what="munged")
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: all(self.node_state(n).startswith("IDLE") for n in NODES), seconds=60, what="two nodes")

    def stop(self) -> None:
        """End every job and every daemon, whatever state they are in."""
        for name in NODES:
            for process in _processes_of(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            environment = {**self.environment, _MARK: name}
            self.daemons[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster while the block runs; `folder` holds its state and logs."""
    munge = folder / "munge"
    for path in (munge, folder / "state"):
        path.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o600)
    conf = _CONF.format(host=socket.gethostname().split(".")[0], folder=folder, munge=munge, ports=_free_ports(3))
    (folder / "slurm.conf").write_text(conf)
    made = Cluster(folder, environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()})
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _processes_of(node: str) -> list[int]:
    """The processes of the jobs' steps on a node, and the daemons that watch over them."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            if {f"SLURMD_NODENAME={node}".encode(), f"{_MARK}={node}".encode()} & set(environment):
                found.append(int(entry.name))
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
