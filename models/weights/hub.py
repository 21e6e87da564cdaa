"""Files of the Hugging Face hub, from its cache or by a download that fails within seconds."""

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub

_hub: Any = huggingface_hub  # its types are incomplete

NETWORK_TIMEOUT_S = 5.0
ENCODER_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
"""Configs, weights and vocabularies; no pickles and no code."""


def fetch_file(repo: str, name: str) -> Path:
    """Return the path of a repository's file, downloaded if it is not in the cache.

    Raises: OSError with a message of one line if the download fails.
    """
    cached = _hub.try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return Path(cached)
    return _download(lambda: _hub.hf_hub_download(repo, name))


def fetch_encoder(repo: str) -> Path:
    """Return the folder of a repository's files of a network, downloaded if not in the cache.

    Raises: OSError with a message of one line if the download fails.
    """
    try:
        folder = _hub.snapshot_download(repo, allow_patterns=ENCODER_FILES, local_files_only=True)
        cached = Path(folder)
    except (OSError, ValueError):
        cached = None
    # an interrupted download has the small files, without the weights
    if cached is not None and any(cached.glob("*.safetensors")):
        return cached
    return _download(lambda: _hub.snapshot_download(repo, allow_patterns=ENCODER_FILES))


def _download(fetch: Callable[[], str]) -> Path:
    try:
        _require_network()
        return Path(fetch())
    except (OSError, ValueError) as error:
        raise OSError(next(iter(str(error).splitlines()), "") or type(error).__name__) from error


def _require_network() -> None:
    """Raise OSError within seconds if the hub is out of reach; its client retries for a minute."""
    request = urllib.request.Request(_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        # a mirror may answer "not found" for its root, but have the file
        if error.code >= 500:
            raise
