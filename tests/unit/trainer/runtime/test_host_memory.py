"""Free memory as the kernel and the job's control groups tell it."""

from pathlib import Path

import psutil
import pytest

from trainer.runtime.host_memory import free_host_memory_bytes

KIB = 1024
MEMINFO = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 800 kB\n"


def machine(folder: Path, groups: str) -> tuple[Path, Path]:
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(groups)
    cgroups.mkdir()
    return proc, cgroups


def limit(folder: Path, names: tuple[str, str], most: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


def test_without_limits_it_is_the_kernels_estimate(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, "0::/\n")
    assert free_host_memory_bytes(proc, cgroups) == 800 * KIB


@pytest.mark.parametrize(
    ("version", "groups", "root"),
    [
        (2, "0::/slurm/job_1/step_0\n", "."),
        (1, "9:cpu,cpuacct:/x\n4:memory:/slurm/job_1/step_0\n", "memory"),
    ],
)
def test_the_tightest_group_above_the_process_decides(
    version: int, groups: str, root: str, tmp_path: Path
) -> None:
    names = {
        2: ("memory.max", "memory.current"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    }[version]
    proc, cgroups = machine(tmp_path, groups)
    limit(cgroups / root / "slurm", names, "9999999999", 0, 0)
    limit(cgroups / root / "slurm" / "job_1", names, str(300 * KIB), 200 * KIB, 50 * KIB)
    assert free_host_memory_bytes(proc, cgroups) == 150 * KIB
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    limit(cgroups / root / "slurm" / "job_1" / "step_0", names, unlimited, 200 * KIB, 0)
    assert free_host_memory_bytes(proc, cgroups) == 150 * KIB


def test_here_it_is_at_most_what_the_kernel_has() -> None:
    assert 0 < free_host_memory_bytes() <= psutil.virtual_memory().total
