"""Free host memory for this process."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def free_host_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the memory, in bytes, that this process can use without swapping.

    Page cache counts as free, because the kernel can drop it. Slurm and containers limit a job by
    control groups (version 1 or 2); of all groups around this process the tightest limit applies.
    proc, cgroups: where the kernel shows memory and groups.
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
    except OSError:  # the group is not visible, for example inside a container
        return None
    return max(0, int(most) - used + int(fields.get("inactive_file", 0)))
