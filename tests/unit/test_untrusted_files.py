"""Files of strangers are opened in few places; everybody else asks these.

`docs/security.md` tells what each place bounds. A new reader uses `data.storage.untrusted` and
`data.storage.documents`; a new place is added below with the reason why it may stand alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.shards import formats
from tests.support.paths import ROOT
from tests.support.pictures import HEIC_START

PACKAGES = ("trainer", "models", "data", "conf", "examples")

DOORS: dict[str, dict[str, str]] = {
    "Image.open": {
        "data/shards/codecs.py": "bounds bytes, pixels and formats",
        "models/conditioning/degradations.py": "a JPEG made by this process",
    },
    "json.load": {},
    "json.loads": {
        "data/storage/documents.py": "bounds size and depth",
        "models/conditioning/clip.py": "models/ knows no data/; bounds the size itself",
        "models/conditioning/transformers_text.py": "text made by this process",
        "trainer/pack/origin.py": "text made by this process",
        "trainer/callbacks/wandb_mirror.py": "a pipe from this process's parent",
    },
    "yaml.load": {"data/storage/documents.py": "bounds size, refuses aliases and tags"},
    "yaml.safe_load": {"trainer/config/gpus.py": "a file of this package"},
    "yaml.unsafe_load": {},
    "OmegaConf.load": {},
    "parquet.ParquetFile": {"data/storage/parquet.py": "bounds rows, bytes and cells"},
    "parquet.read_table": {},
    "mmap.mmap": {},
    "np.load": {},
    "np.memmap": {},
    "pickle.load": {},
    "pickle.loads": {},
    "torch.load": {
        "models/weights/files.py": "a file that an option names, weights_only",
        "models/first_stage/perceptual.py": "torchvision's weights, weights_only",
        "models/first_stage/efficientnet.py": "weights of a known hash, weights_only",
        "trainer/metrics/features.py": "a file that an option names, weights_only",
        "trainer/clip/job.py": "a file that this process's child has written, weights_only",
    },
    "load_file": {
        "models/weights/files.py": "a file that an option names",
        "trainer/metrics/features.py": "a file that an option names",
    },
    "safe_open": {"trainer/checkpoints/reader.py": "after the hashes have been verified"},
    "gzip.open": {},
    "gzip.decompress": {},
    "zlib.decompress": {},
    "tarfile.open": {},
    "ZipFile": {
        "data/storage/zips.py": "bounds the list of members and each member, writes nothing"
    },
    "tempfile.mktemp": {},
    "os.system": {},
}
"""Call → file that may make it → reason."""

OWN_FILES = {
    "trainer/config/gpus.py": "a file of this package",
    "trainer/runtime/host_memory.py": "/proc and /sys",
    "data/storage/lease.py": "/proc",
    "trainer/train/watchdog.py": "a file that this process has just written",
    "models/conditioning/clip.py": "bounds the size itself",
}
"""Files that may call `read_text` or `read_bytes` of a path → reason."""

Call = tuple[str, int]


def calls(path: Path) -> Iterator[Call]:
    """The dotted names of all calls in a file, without leading underscores, and their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).removeprefix("_"), node.lineno


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CALLS = {path.relative_to(ROOT).as_posix(): list(calls(path)) for path in FILES}


def is_call_of(found: str, door: str) -> bool:
    return found == door or found.endswith(f".{door}")


@pytest.mark.parametrize("door", DOORS)
def test_files_are_parsed_in_few_places(door: str) -> None:
    found = {
        path: [f"{path}:{line}" for call, line in made if is_call_of(call, door)]
        for path, made in CALLS.items()
    }
    assert {path: lines for path, lines in found.items() if lines and path not in DOORS[door]} == {}
    assert {path for path, lines in found.items() if lines} == set(DOORS[door])


def test_whole_files_are_read_with_a_limit() -> None:
    """`Path.read_text` waits at a FIFO, follows links, and takes any memory."""
    found = {
        path
        for path, made in CALLS.items()
        for call, _ in made
        if "." in call and call.rpartition(".")[2] in ("read_text", "read_bytes")
    }
    assert found == set(OWN_FILES)


def test_pictures_are_opened_with_a_list_of_formats() -> None:
    tree = ast.parse((ROOT / "data/shards/codecs.py").read_text())
    opened = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    (node,) = opened
    (given,) = [word.value for word in node.keywords if word.arg == "formats"]
    assert ast.unparse(given) == "allowed"
    plain = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
    assert formats.readers(b"anything") == plain
    assert formats.readers(formats.JXL_STREAM) == ("JXL",)
    assert formats.readers(HEIC_START) == ("HEIF",)


def test_tensors_are_loaded_without_code() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert words.get("weights_only") == "True", f"{path}:{node.lineno}"
