"""Make the references of an experiment before its training."""

from trainer.config import Config
from trainer.metrics.references import build_references
from trainer.runtime.ranks import join
from trainer.train.stop import StopRequest


def make_references(config: Config) -> int:
    """Make the missing references of eval.features, and print the folder.

    Returns the exit code: 0 done, 85 asked to stop; the same command then continues.
    Raises: FileNotFoundError or ValueError that names the config path of missing data or
    weights; OSError if a reference cannot be written.
    """
    ranks = join()
    stop = StopRequest(ranks, "batch")
    references = build_references(config, ranks)
    if not references.load_or_make(stop.stopping):
        return stop.exit_code("finished parts of references are saved")
    if missing := references.missing():
        raise OSError(
            f"eval.references={config.eval.references}: no {missing[0]} written: make room"
        )
    for name, reference in references.loaded.items():
        print(f"{name}: {reference.moments.count} images, in {config.eval.references}")
    return 0
