"""Folders of compiled code: a process loads it as its own, so nobody else may have written it."""

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from data.storage.private import private_folder

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
VARIABLES = ("TRITON_CACHE_DIR", INDUCTOR, "TORCH_EXTENSIONS_DIR")
"""Environment variables that name a folder of compiled code."""


def use_private_caches(environment: MutableMapping[str, str] = os.environ) -> None:
    """Check the folders that the environment names, and name one where torch's own is unsafe.

    Torch's own folder for Inductor lies in the temporary folder, under a name that every user of
    the node can take first.
    Raises: PermissionError naming the variable, where another user could change a folder.
    """
    if not environment.get(INDUCTOR):
        environment[INDUCTOR] = str(_own_folder())
    for variable in VARIABLES:
        if folder := environment.get(variable):
            private_folder(Path(folder), option=variable)


def _own_folder() -> Path:
    """Make a folder in the temporary folder or, where every user may rename there, at home.

    Raises: OSError naming the variable, where neither is safe.
    """
    temporary = Path(tempfile.gettempdir()) / f"latent-foundry-{os.getuid()}"
    try:
        return private_folder(temporary / "inductor", option=INDUCTOR)
    except OSError:
        home = Path("~/.cache/latent-foundry").expanduser()
        return private_folder(home / "inductor", option=INDUCTOR)
