"""The progress of a run or of references, in one line for the job scripts.

A script passes on the section of the config that `--cfg` prints. It need not read YAML, which may
quote a folder, or write it in several lines:

    python -m trainer --cfg job --package run --resolve … | python -m trainer.runs.progress
"""

import hashlib
import sys
from pathlib import Path

from omegaconf import OmegaConf

from data.secrets import HIDDEN
from data.text import printable
from trainer.runs.paths import newest_checkpoint


def progress(section: str) -> str:
    """Say how far a job has got: another line after each step forward.

    section: YAML of the section `run` or `eval` of a config. Folders from the environment are named
    by their interpolations, as everywhere.
    Raises: ValueError where the text is neither section, or hides the folder.
    """
    tree = OmegaConf.create(section)
    written, found = (OmegaConf.to_container(tree, resolve=resolve) for resolve in (False, True))
    match written, found:
        case {"dir": str(shown)}, {"dir": str(folder)}:
            newest = newest_checkpoint(Path(folder))
            place = f"{shown}/{newest.relative_to(folder)}" if newest else f"the start of {shown}"
        case {"references": str(shown)}, {"references": str(folder)}:
            names = sorted(path.name for path in Path(folder).rglob("*") if path.is_file())
            state = hashlib.sha256("\n".join(names).encode(errors="replace")).hexdigest()[:12]
            place = f"state {state} of {shown}"
        case _:
            raise ValueError("no run.dir and no eval.references in the text of the config")
    if HIDDEN in shown:
        raise ValueError(f"the folder {shown} has a secret in its name: choose another")
    return printable(" ".join(place.split()), limit=4096)


if __name__ == "__main__":
    try:
        print(progress(sys.stdin.read()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
