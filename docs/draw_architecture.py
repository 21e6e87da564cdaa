"""Draw the pictures of docs/architecture.md: `python -m docs.draw_architecture`.

Commands and file names come from the code, the floors from pyproject.toml.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trainer.runs.paths import CHECKPOINTS, EVALUATIONS, METRICS, REPORT, SNAPSHOTS

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "images"
WIDTH = 1000
HEIGHT = 54
"""Of a box, in pixels."""
FONT = 'font-family="Helvetica, Arial, sans-serif"'
INK, SHADE, ACCENT = "#1b1f24", "#e9edf2", "#1d4a7a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A box of the data flow; x and y are its top left corner, in pixels."""

    title: str
    detail: str = ""
    x: int
    y: int
    width: int = 160
    kind: str = "data"
    """data: files; command: a folder of trainer/; code: a file of the training."""

    def edge(self, across: int, down: int) -> str:
        """Middle of an edge, as a point of a path: (-1, 0) left, (1, 0) right, (0, 1) bottom."""
        x = self.x + (1 + across) * self.width // 2
        return f"{x} {self.y + (1 + down) * HEIGHT // 2}"


def command(name: str, x: int, y: int) -> Node:
    """A command, named by its folder.

    Raises: FileNotFoundError if there is no such command.
    """
    folder = ROOT / "trainer" / name
    if not (folder / "__main__.py").exists():
        raise FileNotFoundError(f"{folder} is no command")
    return Node(title=name, detail=f"trainer/{name}", x=x, y=y, kind="command")


def code(path: str, title: str, x: int, y: int, width: int = 190) -> Node:
    """A file of the training.

    Raises: FileNotFoundError if there is no such file.
    """
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{ROOT / path}: no such file")
    return Node(title=title, detail=path, x=x, y=y, width=width, kind="code")


def _beside(first: Node, second: Node) -> str:
    """Path of an arrow between two boxes of one row."""
    way = 1 if first.x < second.x else -1
    return f"M{first.edge(way, 0)} L{second.edge(-way, 0)}"


def _below(first: Node, second: Node) -> str:
    """Path of an arrow down to a box of the next row."""
    return f"M{first.edge(0, 1)} L{second.edge(0, -1)}"


RAW = Node(title="raw pictures", detail="and captions", x=20, y=20)
PACK = command("pack", 220, 20)
SHARDS = Node(title="image shards", detail="+ manifest, index", x=420, y=20)
PRECOMPUTE = command("precompute", 620, 20)
LATENTS = Node(title="latent shards", detail="+ statistics", x=820, y=20)
STREAM = code("data/streams/latents.py", "stream → batches", 785, 160)
LOSS = code("trainer/train/denoising_loss.py", "batch → loss", 525, 160, 215)
ENGINE = code("trainer/engine/engine.py", "loss → new weights", 265, 160, 215)
SAVED = Node(title=CHECKPOINTS, detail=f"+ {SNAPSHOTS.as_posix()}", x=20, y=160)
EVALUATE = command("evaluate", 220, 310)
SAMPLE = command("sample", 420, 310)
EXPORT = command("export", 620, 310)
EMA = command("ema", 820, 310)
NUMBERS = Node(title=METRICS, detail=f"+ {EVALUATIONS}", x=220, y=420)
DRAWN = Node(title="images", detail="of prompts", x=420, y=420)
FOLDER = Node(title="folder", detail="for diffusers", x=620, y=420)
AVERAGE = Node(title="average", detail="of another width", x=820, y=420)
REPORT_COMMAND = command("report", 220, 530)
PAGE = Node(title=REPORT, detail="one page", x=420, y=530)
BESIDE = {
    command("plan", 20, 640): "config → memory, time and cost",
    command("reference", 350, 640): "image shards → features of real images",
    command("clip", 680, 640): "image shards → a text encoder",
}
"""Commands beside the flow, with a description of each."""
NODES = (
    *(RAW, PACK, SHARDS, PRECOMPUTE, LATENTS, STREAM, LOSS, ENGINE, SAVED, EVALUATE, SAMPLE),
    *(EXPORT, EMA, NUMBERS, DRAWN, FOLDER, AVERAGE, REPORT_COMMAND, PAGE, *BESIDE),
)
ARROWS = (
    _beside(RAW, PACK),
    _beside(PACK, SHARDS),
    _beside(SHARDS, PRECOMPUTE),
    _beside(PRECOMPUTE, LATENTS),
    f"M{LATENTS.edge(0, 1)} L900 {STREAM.y}",
    _beside(STREAM, LOSS),
    _beside(LOSS, ENGINE),
    _beside(ENGINE, SAVED),
    *(
        f"M{SAVED.edge(0, 1)} V285 H{one.x + 80} V{one.y}"
        for one in (EVALUATE, SAMPLE, EXPORT, EMA)
    ),
    _below(EVALUATE, NUMBERS),
    _below(SAMPLE, DRAWN),
    _below(EXPORT, FOLDER),
    _below(EMA, AVERAGE),
    _below(NUMBERS, REPORT_COMMAND),
    _beside(REPORT_COMMAND, PAGE),
)
LOGGED = f"M400 {ENGINE.y + 84} V{NUMBERS.y + 27} H380"
"""Numbers that the training logs."""


def draw_flow() -> str:
    """Draw the way from pictures to a report as SVG.

    Raises: FileNotFoundError naming a command or a file of the picture that is not there.
    """
    parts = list(_frame())
    parts += [_arrow(path) for path in ARROWS]
    # a white line below makes its crossing with another arrow visible
    parts.append(f'<path d="{LOGGED}" fill="none" stroke="#ffffff" stroke-width="8"/>')
    parts.append(_arrow(LOGGED))
    for node in NODES:
        parts += _node(node)
    for node, words in BESIDE.items():
        parts.append(_text(node.x, node.y + 74, words, size=13, anchor="start"))
    return _page(735, parts)


def draw_floors() -> str:
    """Draw the floors of the three packages, from the contracts of import-linter, as SVG."""
    parts: list[str] = []
    below = _building(parts, "trainer", x=20, y=20, width=960)
    ends = [
        _building(parts, name, x=x, y=below + 20, width=470)
        for name, x in (("models", 20), ("data", 510))
    ]
    return _page(max(ends) + 10, parts)


def layers(package: str) -> list[list[str]]:
    """Read the floors of a package from pyproject.toml, from the top; each lists its rooms."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = (
        contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract.get("containers") == [package]
    )
    return [[room.strip() for room in floor.split("|")] for floor in found]


def _frame() -> Iterator[str]:
    """Draw the dashed frame around a training step, and its two texts."""
    yield (
        f'<rect x="245" y="108" width="740" height="136" rx="6" fill="#ffffff" stroke="{INK}" '
        'stroke-width="1.5" stroke-dasharray="6 4"/>'
    )
    title = "python -m trainer: one optimizer step, in trainer/train/loop.py"
    yield _text(258, 132, title, size=14, anchor="start", weight="bold")
    yield _text(258, 234, "U-Net: models/unet.py", size=13, anchor="start")


def _node(node: Node) -> Iterator[str]:
    fill, ink = {"data": ("#ffffff", INK), "command": (ACCENT, "#ffffff"), "code": (SHADE, INK)}[
        node.kind
    ]
    radius = 18 if node.kind == "data" else 3
    yield (
        f'<rect x="{node.x}" y="{node.y}" width="{node.width}" height="{HEIGHT}" rx="{radius}" '
        f'fill="{fill}" stroke="{INK}" stroke-width="1.5"/>'
    )
    middle = node.x + node.width // 2
    yield _text(middle, node.y + 24, node.title, size=15, fill=ink, weight="bold")
    yield _text(middle, node.y + 43, node.detail, size=13, fill=ink)


def _arrow(path: str) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.8" marker-end="url(#tip)"/>'
    )


def _building(parts: list[str], package: str, *, x: int, y: int, width: int) -> int:
    """Add a package's floors to `parts`; return the y below them."""
    parts.append(_text(x, y + 14, f"{package}/", size=16, anchor="start", weight="bold"))
    y += 24
    for rooms in layers(package):
        each = (width - 4 * (len(rooms) - 1)) / len(rooms)
        for number, room in enumerate(rooms):
            left = x + number * (each + 4)
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{each:.1f}" height="28" '
                f'fill="{SHADE}" stroke="{INK}"/>'
            )
            parts.append(_text(round(left + each / 2), y + 19, room, size=13))
        y += 34
    return y


def _text(
    x: int,
    y: int,
    words: str,
    *,
    size: int,
    anchor: str = "middle",
    fill: str = INK,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x}" y="{y}" {FONT} font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
    )


def _page(height: int, parts: Sequence[str]) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}">'
    )
    white = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, tip, white, *parts, "</svg>", ""])


def main() -> None:
    """Write both pictures."""
    for name, text in (("flow.svg", draw_flow()), ("floors.svg", draw_floors())):
        (PICTURES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
