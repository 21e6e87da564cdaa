"""A real Slurm cluster of several nodes on one machine, for as long as a test session.

Each node is a slurmd in namespaces of its own (processes, host name, /etc/hosts), and so are the
controller and munged. The first process of such a namespace waits for the end of a pipe from here;
when this process ends, however it ends, the kernel kills all that lives in the namespaces. Ports,
keys and state lie in a folder of the test session: no other Slurm is touched, none is needed.
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NAMESPACES = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--uts", "--mount"]
# What $2… says runs until the pipe on standard input ends, and the namespace with it.
FIRST_PROCESS = """
hostname "$0"
mount --bind "$1" /etc/hosts
shift
"$@" </dev/null &
read -r _
"""
GPUS, CPUS, MEMORY_MIB = 8, 16, 16_000

CONFIG = """
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# the nodes are what is written here, whatever the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
SlurmdTimeout=5
KillWait=10
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP
PartitionName=gpu Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=preemptible PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


class CannotRunSlurm(Exception):
    """This machine is not one to start a cluster on; says why."""


class Cluster:
    """Partitions `gpu`, `preemptible` and, above it, `urgent`, on node1, node2, …

    Raises: CannotRunSlurm where there is no root, no Slurm to install, or no namespaces.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        check_machine(folder)
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._running: dict[str, subprocess.Popen[str]] = {}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = inherited | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._write_config()
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Run a client command, such as squeue, and return what it prints."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path, **variables: str) -> str:
        """sbatch; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job, such as JobState, Restarts, ExitCode and NodeList."""
        line = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def fail(self, node: str) -> None:
        """Cut a node's power: all its processes are gone at once."""
        first = self._running.pop(node)
        first.kill()
        first.communicate()

    def restore(self, node: str) -> None:
        """Switch a node on again."""
        self._start_node(node)
        self._wait_for_nodes()

    def stop(self) -> None:
        """Kill everything at once."""
        for first in self._running.values():
            first.kill()
        for first in self._running.values():
            first.communicate()
        self._running.clear()

    def _write_config(self) -> None:
        folder = self.folder
        for name in ("state", "dev", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        for gpu in range(
            GPUS
        ):  # Slurm counts them, and sets CUDA_VISIBLE_DEVICES: /dev/null will do
            os.mknod(folder / "dev" / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        port, *node_ports = free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.1.{number} "
            f"Port={node_port} Weight={len(self.nodes) - number + 1}"
            for number, (node, node_port) in enumerate(zip(self.nodes, node_ports, strict=True), 1)
        ]
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=folder,
                port=port,
                cpus=CPUS,
                memory=MEMORY_MIB,
                gpus=GPUS,
                nodes="\n".join(lines),
            )
        )
        (folder / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n"
        )
        (folder / "cgroup.conf").touch()
        hosts = ["127.0.0.1 localhost", "127.0.0.1 controller"]
        hosts += [f"127.0.1.{number} {node}" for number, node in enumerate(self.nodes, 1)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_all(self) -> None:
        folder = self.folder
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        self._wait((folder / "munge.socket").exists, "munged")
        self._start("controller", ["slurmctld", "-D"])
        for node in self.nodes:
            self._start_node(node)
        self._wait_for_nodes()

    def _start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def _start(self, host: str, daemon: list[str]) -> None:
        with (self.folder / f"{host}.log").open("a") as log:
            self._running[host] = subprocess.Popen(
                [*NAMESPACES, "bash", "-c", FIRST_PROCESS, host, self.folder / "hosts", *daemon],
                env=self.environment,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )

    def _wait_for_nodes(self) -> None:
        def ready() -> bool:
            query = ["sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T"]
            shown = subprocess.run(
                query, env=self.environment, capture_output=True, text=True, check=False
            )
            states = shown.stdout.split()
            return len(states) == len(self.nodes) and set(states) <= {"idle", "mixed", "allocated"}

        self._wait(ready, "the nodes")

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            if time.monotonic() > deadline:
                logs = [log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log"))]
                raise RuntimeError(f"{what} did not come up\n" + "\n".join(logs))
            time.sleep(0.1)


def check_machine(folder: Path) -> None:
    """Install Slurm where it is missing; raises CannotRunSlurm where that is not to be."""
    if os.geteuid():
        raise CannotRunSlurm("only root can start Slurm's daemons")
    tried = subprocess.run([*NAMESPACES, "hostname", "test"], capture_output=True, text=True)
    if tried.returncode:
        raise CannotRunSlurm(f"no namespaces: {tried.stderr.strip()}")
    with one_at_a_time("slurm-install"):
        missing = [name for tool, name in PACKAGES.items() if not shutil.which(tool, path=PATH)]
        if missing:
            install(missing, folder)


@contextmanager
def one_at_a_time(name: str) -> Generator[None]:
    """Let the processes of a test session pass one by one: `apt-get update` waits for nobody."""
    with Path(tempfile.gettempdir(), f"{name}-{os.geteuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(packages: list[str], folder: Path) -> None:
    """Install Debian packages without starting their services."""
    if not shutil.which("apt-get"):
        raise CannotRunSlurm(f"{', '.join(packages)} missing, and no apt-get to install them")
    apt = ["apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=600"]
    # dpkg asks this one before it starts a service
    refusal = Path("/usr/sbin/policy-rc.d")
    ours = not refusal.exists()
    if ours:
        refusal.write_text("#!/bin/sh\nexit 101\n")
        refusal.chmod(0o755)
    try:
        with (folder / "apt.log").open("w") as log:
            for words in (["update"], ["install", "--no-install-recommends", *packages]):
                done = subprocess.run(
                    [*apt, *words],
                    env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                    stdout=log,
                    stderr=log,
                    check=False,
                )
                if done.returncode:
                    said = (folder / "apt.log").read_text().strip().splitlines()[-1]
                    raise CannotRunSlurm(f"apt-get {words[0]} failed: {said}")
    finally:
        if ours:
            refusal.unlink()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    # Test runs side by side have neighbouring process numbers: leave each of them some ports.
    port = 10_000 + 16 * os.getpid() % 9_000
    while len(found) < count:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        port += 1
    return found
