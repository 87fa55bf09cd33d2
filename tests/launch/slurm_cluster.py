"""A real Slurm of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd.

Unusual: Debian's slurmd lets several run on one host, each with its node's name (-N) and port. Nothing is installed,
started or stopped through systemd and no cgroups are used; daemons run in the foreground as children of this process,
die with it however it ends, and everything with this cluster's configuration in its environment is ended at the end.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def lacking() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "slurmd starts jobs as root; this is not root"
    missing = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge" if missing else None


# cred_expire is also how long a requeued job waits before it starts again, two minutes by default; KillWait is what a
# job is left after SIGTERM.
CONFIG = """
ClusterName=hdl
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=60
MessageTimeout=60
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    def tell(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job or one task of an array: RUNNING, COMPLETED, ..."""
        shown = self.tell("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: str, *, seconds: float = 300) -> str:
        """Until a job has come to its end."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"):
            assert time.monotonic() < until, f"job {job} is still {state} after {seconds:g} s"
            time.sleep(0.5)
        return state

    def told(self) -> str:
        """By the daemons; for the message of a failing test."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


def _ports(count: int) -> list[int]:
    """Free ones, below those that the kernel gives to connections."""
    found: list[int] = []
    for port in range(11000 + os.getpid() % 9000, 32000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two idle nodes, node1 and node2."""
    folder = Path(
        tempfile.mkdtemp(prefix="hdl-slurm-")
    )  # short: sockets in it have names of 108 bytes at most
    config = folder / "slurm.conf"
    controller, *ports = _ports(3)
    names = ("node1", "node2")
    nodes = "\n".join(NODE.format(name=name, port=port) for name, port in zip(names, ports))
    config.write_text(CONFIG.format(folder=folder, controller=controller, nodes=nodes))
    for name in ("state", *(f"spool-{name}" for name in names)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment = kept | {"SLURM_CONF": str(config), "PATH": PATH}
    made = Cluster(folder, environment)

    daemons = [
        ["munged", "--foreground", "--force", *(
            f"--{what}={folder}/munge.{what.split('-')[0]}"
            for what in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        )],
        ["slurmctld", "-D", "-f", str(config)],
        *(["slurmd", "-D", "-N", name, "-f", str(config)] for name in names),
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ended = stack.enter_context(ExitStack())
        stack.callback(_end, environment["SLURM_CONF"])
        for number, command in enumerate(daemons):
            printed = stack.enter_context((folder / f"{command[0]}{number}.printed.log").open("w"))
            started = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=environment, stdout=printed, stderr=printed
            )
            ended.callback(started.wait)
            if command[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), made, "munged made no socket")
        _until(lambda: _idle(made) == 2, made, "the two nodes did not become idle")
        yield made


def _idle(made: Cluster) -> int:
    with suppress(AssertionError):  # the controller does not answer yet
        return made.tell("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    return 0


def _until(holds, made: Cluster, otherwise: str) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, f"{otherwise} within 60 s\n{made.told()}"
        time.sleep(0.2)


def _end(config: str) -> None:
    """Everything that runs with this configuration: daemons, and of jobs the steps that a failed test left."""
    until = time.monotonic() + 30
    while running := [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_of(pid, config)
    ]:
        assert time.monotonic() < until, f"still running with {config}: {running}"
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _is_of(pid: int, config: str) -> bool:
    try:
        # without one when it has ended and waits for its parent
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return pid != os.getpid() and f"SLURM_CONF={config}".encode() in environment
    except OSError:
        return False
