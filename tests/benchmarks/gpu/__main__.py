"""One check of everything that only a GPU shows: `python -m tests.benchmarks.gpu --out FOLDER`.

Every row is a process with a limit, keeps its figures as they come in FOLDER/gpu.json, and never
stops the others; what it prints is in FOLDER/gpu.log. The predictions were written beforehand. With
`--device cpu --small` every row runs with tiny networks, and the figures mean nothing.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.gpu.rows import ROWS, ROWS_ON_SEVERAL, predictions
from tests.benchmarks.gpu.runner import FAILED, Job, Result, judge, run, summary
from tests.support.paths import ROOT

BUDGET_S = 470
PRELOADED = {
    # a server that had called CUDA could not fork
    "cuda": ["torch"],
    "cpu": ["torch._dynamo", "trainer.train.loop", "trainer.precompute.job", "open_clip"],
}


def main() -> int:
    """Returns 1 if a row failed."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED[given.device])
    deadline_s = time.monotonic() + given.budget_s
    rows = ROWS_ON_SEVERAL if given.gpus > 1 else ROWS
    predicted, results = predictions(ROOT), list[Result]()
    with tempfile.TemporaryDirectory() as name:
        log = given.out / "gpu.log"
        job = Job(given.device, given.small, given.gpus, Path(name), log)
        for row in rows:
            if given.rows and row.name not in given.rows:
                continue
            result = run(row, job, context, deadline_s - time.monotonic())
            judge(result, predicted.get(row.name, {}), on_gpu=given.device == "cuda")
            results.append(result)
            content = {"device": given.device, "rows": [asdict(one) for one in results]}
            (given.out / "gpu.json").write_text(json.dumps(content, indent=1))
    print(summary(results), flush=True)
    return int(any(one.state == FAILED for one in results))


def arguments() -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=more)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.log")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all rows")
    parser.add_argument("--device", choices=list(PRELOADED), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--gpus", type=int, default=1, help="above 1: the rows on several GPUs")
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
