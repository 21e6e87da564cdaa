import pytest

from trainer.checks import world_size
from trainer.distributed import join


def test_a_process_in_a_batch_script_is_not_one_of_the_jobs_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert world_size() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert world_size() == 8


def test_ranks_of_srun_that_were_not_told_where_to_meet_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"MASTER_ADDR .* for 8 ranks: .* slurm/train\.sh"):
        join()
