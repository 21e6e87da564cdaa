"""Files of the Hugging Face hub: from its cache, or downloaded; an error in seconds if neither."""

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

NETWORK_TIMEOUT_S = 5.0
ENCODER_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
"""Configs, weights and vocabularies; no pickles and no code."""


def fetch_file(repo: str, name: str) -> Path:
    """A file of a repository. Raises OSError, in one line, where it cannot be had."""
    cached = huggingface_hub.try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return Path(cached)
    return _download(lambda: huggingface_hub.hf_hub_download(repo, name))


def fetch_encoder(repo: str) -> Path:
    """The folder of a repository with a network's files. Raises OSError as `fetch_file`."""
    try:
        options = {"allow_patterns": ENCODER_FILES, "local_files_only": True}
        cached = Path(huggingface_hub.snapshot_download(repo, **options))
    except (OSError, ValueError):
        cached = None
    # an interrupted download has the small files alone
    if cached is not None and any(cached.glob("*.safetensors")):
        return cached
    return _download(lambda: huggingface_hub.snapshot_download(repo, allow_patterns=ENCODER_FILES))


def _download(fetch: Callable[[], str]) -> Path:
    try:
        _require_network()
        return Path(fetch())
    except (OSError, ValueError) as error:
        raise OSError(next(iter(str(error).splitlines()), "") or type(error).__name__) from error


def _require_network() -> None:
    """Fail in seconds: the hub's own client retries for a minute."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        # A mirror may answer its root with "not found", and still have the file.
        if error.code >= 500:
            raise
