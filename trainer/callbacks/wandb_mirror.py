"""The process that talks to W&B: JSON lines on standard input, the first one says which run it is.

It outlives every signal meant for the training, since the last lines come after those, and ends
with its input.
"""

import json
import signal
import sys
from typing import Any

import wandb

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 20
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Mirror until the input ends."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    run = _start(json.loads(sys.stdin.readline()))
    # resumed and rewound runs, and evaluations of their own, log steps that W&B's own cannot go to
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        values: dict[str, Any] = json.loads(line)
        picture = values.pop("picture", None)
        run.log(values if picture is None else {**values, "samples": wandb.Image(picture)})
    run.finish()


def _start(about: dict[str, Any]) -> Any:
    """Start or resume the run; offline where the service refuses or does not answer."""
    try:
        return _init(about)
    except Exception as error:  # W&B has many ways to fail, and a local record is none of them
        if about["mode"] == "offline":
            raise
        print(
            f"warning: W&B is offline from here on: {' '.join(str(error).split())}; "
            f"send it later with wandb sync {about['dir']}/wandb/offline-run-*",
            file=sys.stderr,
            flush=True,
        )
        wandb.teardown()  # W&B's own service still holds the run that it could not start
        return _init({**about, "mode": "offline"})


def _init(about: dict[str, Any]) -> Any:
    return wandb.init(
        **about,
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        ),
    )


if __name__ == "__main__":
    main()
