"""The id of a run in W&B: a random word in the run folder, the same for every start there.

The file names its folder, too. A copied run folder gets another id while the folder that it was
copied from is still there; a moved one keeps its id.
"""

import json
import os
import re
import secrets
from pathlib import Path

from data.secrets import redact, restore
from data.storage.atomic import write_atomic
from data.storage.documents import is_json_object, read_json
from trainer.runs.paths import WANDB_ID

MAX_BYTES = 2**14
FORM = re.compile(r"[\w-]{1,64}", re.ASCII)


def wandb_id(folder: Path, saved: str = "") -> str:
    """Return the id of the run in this folder, and keep it there; rank 0 alone calls it.

    saved: the id in a checkpoint; runs of version 0.1.0 have it there alone. WANDB_RUN_ID wins over
    both. Raises: OSError if the folder cannot be written.
    """
    here = str(folder.resolve())
    kept, home = _read(folder)
    copied = bool(kept) and home != here and _read(Path(home))[0] == kept
    asked = os.environ.get("WANDB_RUN_ID", "")
    if FORM.fullmatch(asked):
        found = asked
    elif copied:
        found = secrets.token_hex(8)
    else:
        found = kept or saved or secrets.token_hex(8)
    if (found, here) != (kept, home):
        text = json.dumps({"id": found, "folder": redact(here)})
        write_atomic(folder / WANDB_ID, text.encode())
    return found


def _read(folder: Path) -> tuple[str, str]:
    """Return the id kept in a folder, and the folder that it names; empty without a sound file."""
    try:
        values: object = read_json(folder / WANDB_ID, limit=MAX_BYTES, below=folder)
    except (OSError, ValueError):
        return "", ""
    if not is_json_object(values):
        return "", ""
    kept, home = values.get("id"), values.get("folder")
    sound = isinstance(kept, str) and isinstance(home, str) and FORM.fullmatch(kept)
    return (str(kept), restore(str(home))) if sound else ("", "")
