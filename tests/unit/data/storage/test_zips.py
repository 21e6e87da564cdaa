"""A zip gives no more bytes of a member than are asked for."""

import os
import zipfile
from pathlib import Path

from data.storage.zips import ZipArchive


def test_a_member_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("./deep//zeros", bytes(10**6))
        archive.mkdir("empty")
    opened = ZipArchive(os.open(path, os.O_RDONLY), str(path))
    assert (list(opened.members), opened.folders) == (["deep/zeros"], ["empty"])
    for limit in (0, 100, 10**6 - 1):
        assert opened.read("deep/zeros", limit) == bytes(limit + 1)
    assert opened.read("deep/zeros", 10**7) == bytes(10**6)
