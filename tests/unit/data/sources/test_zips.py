"""Zips of pictures: the same samples as the same files in a folder, and a reason for each other."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.config import SourceConfig, SourceKind
from data.shards.account import Fate, total
from data.shards.manifest import Rejected
from data.sources import files
from data.sources.files import open_files
from data.sources.samples import RawSample, Source
from data.sources.sources import open_source
from data.storage import zips
from tests.support.data_sets import data_config, png
from trainer.pack.proposal import find_kind

Content = Mapping[str, bytes]


def captioned(number: int, *folders: str) -> dict[str, bytes]:
    """Pictures with a text each."""
    stems = [f"{folder}{row}" for folder in folders for row in range(number)]
    pictures = {f"{stem}.png": png(place) for place, stem in enumerate(stems)}
    return pictures | {f"{stem}.txt": f"caption of {stem}".encode() for stem in stems}


def table_of(rows: list[dict[str, Any]], path: Path) -> bytes:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def write_zip(path: Path, content: Content, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, payload in content.items():
            archive.writestr(name, payload)
    return path


def write_folder(folder: Path, content: Content) -> Path:
    for name, payload in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)
    return folder


def opened(path: Path | str, **options: Any) -> Source:
    source = SourceConfig(path=str(path), **options)
    return open_source(data_config(Path(str(path)).parent / "out", source=source))


def read(source: Source) -> tuple[list[RawSample], dict[str, str]]:
    items = list(source)
    assert len(items) == len(source)
    samples = [item for item in items if isinstance(item, RawSample)]
    return samples, {item.key: item.reason for item in items if isinstance(item, Rejected)}


LABELLED = {"file_name": "deep/1.png", "text": ["one", "two"], "kind": "cat"}
COCO = {
    "images": [{"id": 7, "file_name": "1.png"}],
    "annotations": [{"image_id": 7, "caption": "a cat"}],
}
LAYOUTS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "texts": (captioned(3, "", "deep/"), {}),
    "csv": (
        {"0.png": png(0), "a b/ü.PNG": png(1), "gone.psd": b"x", "notes.md": b"x"}
        | {"metadata.csv": "file_name;text\n0.png;null\na b/ü.PNG;é\nno.png;x\n".encode()},
        {},
    ),
    "jsonl": (
        {"deep/1.png": png(1), "2.png": png(2), "2.json": b'{"text": "two", "x": 3}'}
        | {"captions.jsonl": json.dumps(LABELLED).encode()},
        {"label_field": "kind"},
    ),
    "coco": (
        {f"images/{n}.png": png(n) for n in (1, 2)}
        | {"annotations/captions_val.json": json.dumps(COCO).encode()},
        {},
    ),
    "classes": (
        captioned(2, "cat/", "dog/sub/") | {"top.png": png(9)},
        {"kind": SourceKind.class_folders},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_the_samples_of_the_same_files(
    tmp_path: Path, layout: str, method: int
) -> None:
    content, options = LAYOUTS[layout]
    folder = opened(write_folder(tmp_path / "folder", content), **options)
    zipped = opened(write_zip(tmp_path / "set.ZIP", content, method), **options)
    assert read(folder) == read(zipped)
    assert read(folder)[0]
    assert folder.left_alone.entries() == zipped.left_alone.entries()
    assert (folder.classes, folder.images) == (zipped.classes, zipped.images)
    assert list(folder.sample(2)) == list(zipped.sample(2))


def test_a_parquet_in_a_zip_is_a_table(tmp_path: Path) -> None:
    table = table_of([{"file_name": "0.png", "text": "x"}], tmp_path / "t")
    path = write_zip(tmp_path / "set.zip", {"0.png": png(0), "captions.parquet": table})
    (sample,), _ = read(opened(path))
    assert sample.caption == "x"


@pytest.mark.parametrize("place", ["zips", "zips/*.zip", "zips/p[0-9].zip"])
def test_several_zips_are_one_source_with_tables_of_their_own(tmp_path: Path, place: str) -> None:
    parts = [captioned(2, "cat/", "dog/") for _ in range(3)]
    parts[1] = {"top/0.png": png(5), "top/metadata.csv": b"file_name,text\n0.png,hi\n"}
    for number, part in enumerate(parts):
        write_zip(tmp_path / f"zips/p{number}.zip", part)
    (tmp_path / "zips/more.txt").write_text("left alone")
    samples, reasons = read(opened(tmp_path / place))
    names = [
        f"p{n}.zip/{kind}/{row}.png" for n in (0, 2) for kind in ("cat", "dog") for row in "01"
    ]
    assert [sample.name for sample in samples] == sorted([*names, "p1.zip/0.png"])
    assert {sample.name: sample.caption for sample in samples}["p1.zip/0.png"] == "hi"
    assert not reasons
    classes = opened(tmp_path / place, kind=SourceKind.class_folders)
    samples, reasons = read(classes)
    assert list(classes.classes) == ["cat", "dog"]
    assert {sample.name.split("/")[1]: sample.label for sample in samples} == {"cat": 0, "dog": 1}
    assert reasons == {"p1.zip/0.png": "in no folder of a class"}


def test_files_beside_zips_are_counted(tmp_path: Path) -> None:
    write_zip(tmp_path / "zips/0.zip", captioned(1, ""))
    write_zip(tmp_path / "zips/deep/0.zip", captioned(1, ""))
    write_folder(tmp_path / "zips", {"README": b"x", "deep/._0.zip": b"x", "a.psd": b"x"})
    source = opened(tmp_path / "zips")
    samples, reasons = read(source)
    assert [sample.name for sample in samples] == ["0.zip/0.png", "deep/0.zip/0.png"]
    assert reasons.keys() == {"a.psd"}
    assert total(source.left_alone.entries(), Fate.left_alone) == 2


def test_more_zips_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "OPEN_ZIPS", 2)
    for number in range(5):
        write_zip(tmp_path / f"zips/{number}.zip", captioned(2, ""))
    assert len(read(opened(tmp_path / "zips"))[0]) == 10


def test_zips_beside_pictures_are_left_alone_with_the_way(tmp_path: Path) -> None:
    write_folder(tmp_path / "mixed", captioned(1, ""))
    write_zip(tmp_path / "mixed/more.zip", captioned(1, ""))
    (entry,) = opened(tmp_path / "mixed").left_alone.entries()
    assert "data.source.path=FILE.zip reads it in place" in entry.reason


@pytest.mark.parametrize(
    ("names", "kind", "inside", "found"),
    [
        (
            ["set/train/cat/0.png", "set/train/dog/1.png"],
            "class_folders",
            "",
            ["cat/0.png", "dog/1.png"],
        ),
        (["set/metadata.csv", "set/0.png", "__MACOSX/set/._0.png"], "folder", "", ["0.png"]),
        (["cat/0.png", "cat/1.png"], "class_folders", "", ["cat/0.png", "cat/1.png"]),
        (["set/cat/0.png", "set/README"], "folder", "", ["set/cat/0.png"]),
        (["train/cat/0.png", "val/cat/1.png"], "class_folders", "/train", ["cat/0.png"]),
        (["train/0.png", "training/1.png"], "folder", "/train", ["0.png"]),
    ],
)
def test_a_folder_around_everything_is_entered(
    tmp_path: Path, names: list[str], kind: str, inside: str, found: list[str]
) -> None:
    content = {name: png(number) for number, name in enumerate(names)}
    content |= {name: b"file_name,text\n" for name in names if name.endswith(".csv")}
    path = write_zip(tmp_path / "set.zip", content)
    source = SourceConfig(kind=SourceKind(kind), path=f"{path}{inside}")
    opened_files = open_files(data_config(tmp_path / "out", source=source))
    assert opened_files.listing.images == found
    left = total(opened_files.listing.left_alone.entries(), Fate.left_alone)
    assert len(opened_files.listing.inputs) + len(found) + left == len(names)


def odd_members(path: Path) -> Iterator[tuple[str, str]]:
    """Write a zip of odd members: (key of a sample, part of its reason); empty: it is a sample."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        fates = {
            "../../out.png": "",
            "/etc/passwd.png": "",
            "C:\\pictures\\dos.png": "",
            "new\nline.png": "",
            "bomb.png": "is over",
            "torn.png": "damaged in its zip",
            "lzma.png": "compressed by method 14 of zip, which is not read",
            "bzip2.png": "compressed by method 12 of zip, which is not read",
            "link.png": "a link in a zip, which is not followed",
            "locked.png": "encrypted in its zip",
            "twice.png": "two members of one name in its zip",
            "by_text.png": "a link in a zip, which is not followed",
        }
        for number, name in enumerate(fates):
            info = zipfile.ZipInfo(name)
            info.compress_type = {"lzma.png": 14, "bzip2.png": 12}.get(name, zipfile.ZIP_DEFLATED)
            info.create_system = 0 if "\\" in name else 3
            is_link = name == "link.png"
            info.external_attr = (0o120777 if is_link else 0o100644) << 16
            payload = bytes(2**20) * 257 if name == "bomb.png" else png(number)
            archive.writestr(info, b"/etc/hostname" if is_link else payload)
            text = zipfile.ZipInfo(f"{name.removesuffix('.png')}.txt")
            text.create_system = info.create_system
            text.external_attr = (0o120777 if name == "by_text.png" else 0o100644) << 16
            archive.writestr(text, "/etc/hostname" if name == "by_text.png" else "caption")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("twice.png", png(99))
        archive.mkdir("folder")
        archive.writestr("__MACOSX/._x.png", "x")
    raw = bytearray(path.read_bytes())
    torn = raw.index(b"torn.png") + len("torn.png")
    raw[torn + 20] ^= 0xFF
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked = [at for at in _all(raw, magic) if b"locked.png" in raw[at : at + 60]]
        raw[locked[0] + flags] |= 1
    path.write_bytes(raw)
    for name, reason in fates.items():
        yield name, reason


def _all(raw: bytearray, magic: bytes) -> list[int]:
    return [at for at in range(len(raw)) if raw.startswith(magic, at)]


def test_odd_members_cost_their_samples_alone(tmp_path: Path) -> None:
    path = tmp_path / "odd.zip"
    fates = dict(odd_members(path))
    before = sorted(tmp_path.parent.rglob("*"))
    source = opened(path)
    samples, reasons = read(source)
    shown = {"/etc/passwd.png": "etc/passwd.png", "C:\\pictures\\dos.png": "C:/pictures/dos.png"}
    assert sorted(sample.name for sample in samples) == sorted(
        shown.get(name, name) for name, reason in fates.items() if not reason
    )
    expected = {name: reason for name, reason in fates.items() if reason}
    assert reasons.keys() == expected.keys()
    assert {
        name: reasons[name] for name, part in expected.items() if part not in reasons[name]
    } == {}
    alone = {entry.reason: entry.count for entry in source.left_alone.entries()}
    assert alone == {"entry of a folder": 1, "attributes that a Mac wrote": 1}
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_names_of_programs_that_do_not_say_their_encoding(tmp_path: Path) -> None:
    name, dos = "ü.png", "ü.png".encode("cp437").decode("latin-1")
    for written, stored in ((name, name.encode()), (dos, name.encode("cp437"))):
        path = write_zip(tmp_path / "set.zip", {"##########.png"[-len(stored) :]: png(0)})
        plain = b"##########.png"[-len(stored) :]
        path.write_bytes(path.read_bytes().replace(plain, stored))
        listing = opened(path, require_captions=False)
        assert [item.name for item in listing if isinstance(item, RawSample)] == [name], written


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "directory"])
def test_a_zip_that_cannot_be_read_is_named(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "set.zip", captioned(9, ""))
    whole = path.read_bytes()
    if damage == "directory":
        monkeypatch.setattr(zips, "MAX_DIRECTORY_BYTES", 100)
    else:
        path.write_bytes({"cut": whole[:-300], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"data\.source\.path: .*set\.zip cannot be read as a zip"):
        opened(path)


@pytest.mark.parametrize("name", ["metadata.csv", "captions_val.json"])
def test_a_table_that_a_zip_does_not_give_is_named(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "zips/0.zip", captioned(1, ""))
    path = write_zip(tmp_path / "zips/1.zip", captioned(1, "") | {name: b"file_name,text"})
    raw = bytearray(path.read_bytes())
    raw[raw.index(name.encode()) + len(name)] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"zips/1\.zip/{name}: .*damaged in its zip"):
        opened(tmp_path / "zips")


def test_what_is_neither_folder_nor_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.rar").touch()
    for place in ("set.rar", "gone.zip", "*.zip", "set.zip/train"):
        with pytest.raises(FileNotFoundError, match=r"data\.source\.path: no folder and no zip"):
            opened(tmp_path / place)
    path = write_zip(tmp_path / "set.zip", captioned(1, ""))
    with pytest.raises(FileNotFoundError, match=r"no images .*set\.zip; it holds not in nowhere/"):
        opened(path / "nowhere")
    with pytest.raises(ValueError, match=r"set\.zip is neither a folder nor a"):
        opened(path, kind=SourceKind.image_tables)


def test_a_zip_of_an_own_data_set_is_no_source(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "out/train/set.zip", captioned(1, ""))
    with pytest.raises(ValueError, match=r"data\.source\.path: .* lies in data\.train"):
        open_source(data_config(tmp_path / "out", source=SourceConfig(path=str(path))))


def test_the_fingerprint_of_a_zip_follows_its_content(tmp_path: Path) -> None:
    content = captioned(130, "")  # more files than those whose bytes are compared
    path = write_zip(tmp_path / "set.zip", content)
    first = opened(path).fingerprint()
    write_zip(path, content, zipfile.ZIP_STORED)  # packed in another way, at another time
    assert opened(path).fingerprint() == opened(path).former_fingerprint() == first
    write_zip(path, content | {"99.txt": b"caption of 98"})
    assert opened(path).fingerprint() != first


def test_the_kind_of_a_zip_is_found(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"cat/0.png": png(0), "dog/1.png": png(1)})
    assert find_kind(str(path))[0] is SourceKind.class_folders
    write_zip(path, captioned(2, "cat/", "dog/"))
    assert find_kind(str(path))[0] is SourceKind.folder
    assert find_kind(str(tmp_path))[0] is SourceKind.folder
