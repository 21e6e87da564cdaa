"""Open the source of raw images that a config names."""

from data.config import DataConfig, SourceKind
from data.sources.folder import ClassFolders, FolderSource
from data.sources.image_tables import ImageTables
from data.sources.openmoji import OpenMojiSource
from data.sources.samples import Source
from data.sources.scenes import SceneSource

SOURCES = {
    SourceKind.openmoji: OpenMojiSource,
    SourceKind.scenes: SceneSource,
    SourceKind.folder: FolderSource,
    SourceKind.class_folders: ClassFolders,
    SourceKind.image_tables: ImageTables,
}
"""Sources whose images are written to shards; the tars of a webdataset stay where they are."""


def open_source(config: DataConfig) -> Source:
    """Open the raw images of an experiment.

    Raises: FileNotFoundError or ValueError that names the option of a source that cannot be read.
    """
    return SOURCES[config.source.kind](config)
