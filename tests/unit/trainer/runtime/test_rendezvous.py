"""Ranks that meet, and ranks whose numbers, port or address are wrong."""

import contextlib
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.runtime import rendezvous
from trainer.runtime.rendezvous import Place, meet

distributed: Any = torch.distributed  # it does not declare its stores
LONG = timedelta(seconds=30)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, which the variables of the launcher name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = int(server.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    monkeypatch.setattr(rendezvous, "CONNECT_S", 1.0)
    return found


def test_ranks_of_srun_that_were_not_told_where_to_meet_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    place = Place.read({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "1"})
    with pytest.raises(ValueError, match=r"MASTER_ADDR .* for 8 ranks: .* slurm/train\.sh"):
        meet(place, LONG)


def meet_all(ranks: Sequence[int], world: int) -> list[str]:
    """What each process gets: met, or the error."""

    def meet_one(rank: int) -> str:
        try:
            store = meet(Place(rank=rank, world_size=world, local_rank=rank), LONG)
        except (ValueError, OSError) as error:
            return str(error)
        stores.append(store)
        return "met"

    stores: list[Any] = []
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(meet_one, ranks))


def listening() -> set[str]:
    """The addresses at which this machine listens, as hexadecimal words."""
    text = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    lines = text.splitlines()
    return {line.split()[1] for line in lines if line.split()[3] == "0A"}


def test_ranks_meet_on_the_loopback_interface(port: int) -> None:
    assert meet_all([1, 0, 2], 3) == ["met"] * 3
    store = meet(Place(rank=0, world_size=1, local_rank=0), LONG)
    assert isinstance(store, distributed.HashStore)


def test_the_store_of_one_node_is_closed_to_others(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    with ThreadPoolExecutor(2) as pool:
        places = [Place(rank=rank, world_size=2, local_rank=rank) for rank in (0, 1)]
        stores = list(pool.map(lambda place: meet(place, LONG), places))
    assert len(stores) == 2
    assert f"0100007F:{port:04X}" in listening()
    assert f"00000000:{port:04X}" not in listening()


@pytest.mark.parametrize(
    ("ranks", "world", "twice"),
    [([0, 1, 1], 3, 1), ([0, 0], 2, 0), ([1, 1], 2, 1)],
)
def test_two_equal_ranks_end_all(port: int, ranks: list[int], world: int, twice: int) -> None:
    start_s = time.monotonic()
    said = meet_all(ranks, world)
    problem = f"RANK={twice} was given to two processes: give each rank its own number"
    assert said == [problem] * len(ranks)
    assert time.monotonic() - start_s < 10


@pytest.mark.parametrize("answers", [False, True])
def test_a_port_of_another_program_is_named(
    port: int, answers: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        server = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        server.settimeout(6)
        if answers:
            pool.submit(answer, server)
        said = meet_all([0, 1], 2)
    assert f"MASTER_PORT={port} on 127.0.0.1 is taken by another program" in said[0]
    assert f"MASTER_PORT={port} on 127.0.0.1 belongs to another program" in said[1]


def answer(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_the_port_of_another_job_is_left_alone(port: int) -> None:
    other = distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    other.set("job", "8 ranks of job 7")
    said = meet_all([0, 1], 2)
    assert "is taken by another program" in said[0]
    assert "belongs to 8 ranks of job 7, not to 2 ranks of job" in said[1]
    assert not other.check(["problem"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("MASTER_ADDR", "no.such.host.invalid"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "http")],
)
def test_a_wrong_address_is_named_at_once(
    port: int, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for said in meet_all([0, 1], 2):
        assert said.startswith(f"{name}={value} is no ")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),
    ],
)
def test_places_are_read_from_the_launcher(
    variables: dict[str, str], place: tuple[int, int, int]
) -> None:
    found = Place.read(variables)
    assert (found.rank, found.world_size, found.local_rank) == place


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"]),
        st.integers(-2, 9).map(str) | st.sampled_from(["", "x", "1.5", "²"]),
    )
)
def test_any_variables_give_a_possible_place_or_an_error_that_names_one(
    variables: dict[str, str],
) -> None:
    try:
        place = Place.read(variables)
    except ValueError as error:
        assert str(error).partition("=")[0] in variables or "RANK=" in str(error)
    else:
        assert 0 <= place.rank < place.world_size
