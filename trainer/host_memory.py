"""How much memory of this machine a process may still take."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def free_host_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Memory that can be had without swapping, within the limits of the job's control groups.

    Page cache counts as free, as the kernel gives it up. Slurm and containers limit a job by
    control groups of version 1 or 2; the tightest of the groups above this process decides.
    """
    fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_left_in_groups(proc, cgroups)])


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder, *files)
            if left is not None:
                yield left
            if folder == root:
                break


def _left(folder: Path, limit: str, usage: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        used = int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such group here, as in a container that sees a part of the tree
        return None
    return max(0, int(most) - used + int(fields.get("inactive_file", 0)))
