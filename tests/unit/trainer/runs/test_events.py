"""The history of a run: what was written is read, and a torn line harms no other."""

from pathlib import Path

from trainer.runs.events import add_event, read_events


def test_events_are_read_in_order_without_damaged_lines(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    add_event(tmp_path, 0, "start")
    changed = {"optim.lr": {"old": 1.0, "new": 2.0}}
    add_event(tmp_path, 3, "resume", changed=changed)
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "wh\n[1]\n\xff\n')
    add_event(tmp_path, 5, "resume")
    found = read_events(tmp_path)
    assert [(event["step"], event["what"]) for event in found] == [
        (0, "start"),
        (3, "resume"),
        (5, "resume"),
    ]
    assert found[1]["changed"] == changed
    assert found[0]["time"] <= found[2]["time"]
