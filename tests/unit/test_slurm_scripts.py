import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").glob("*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, Path(".ci/run")], ids=str)
def test_shellcheck_finds_nothing(script: Path):
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "--external-sources", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_training_passes_its_arguments_on_and_requeues_what_is_worth_it(tmp_path: Path):
    """The script itself, with stand-ins for Slurm's three commands."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "srun": 'echo "srun $*"; exit "$SRUN_CODE"',
        "scontrol": '[[ $1 == show ]] && echo node1 || echo "scontrol $*"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(code: int) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SRUN_CODE": str(code),
        }
        return subprocess.run(
            ["bash", "slurm/train.sh", "+experiment=laion_512", "optim.lr=1e-4"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(0)
    assert done.returncode == 0
    assert "-m trainer +experiment=laion_512 optim.lr=1e-4" in done.stdout
    assert "requeue" not in done.stdout
    stopped = run(85)
    assert stopped.returncode == 85
    assert "scontrol requeue 7" in stopped.stdout
    broken = run(1)
    assert broken.returncode == 1
    assert "requeue" not in broken.stdout
