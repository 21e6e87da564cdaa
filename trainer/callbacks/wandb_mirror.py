"""The process that sends to W&B: it reads JSON lines from standard input until the input ends.

The first line has the arguments of wandb.init, and the values that no message may show. The process
ignores signals to the training, because the last lines come after them.
"""

import json
import signal
import sys
from typing import Any

import wandb

from data.secrets import hide
from trainer.runtime.output import clean_output

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 20
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Send all lines of standard input to W&B."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    options = json.loads(sys.stdin.readline())
    for instead, value in options.pop("hidden").items():
        hide(value, instead)
    with clean_output():
        _mirror(options)


def _mirror(options: dict[str, Any]) -> None:
    run = _start(options)
    # W&B's own step cannot decrease, but resumed runs, rewinds and evaluations log earlier steps
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        values: dict[str, Any] = json.loads(line)
        picture = values.pop("picture", None)
        run.log(values if picture is None else {**values, "samples": wandb.Image(picture)})
    run.finish()


def _start(options: dict[str, Any]) -> Any:
    """Start or resume the run; offline if the service refuses or does not answer."""
    try:
        return _init(options)
    except Exception as error:  # W&B fails in many ways; an offline run has none of them
        if options["mode"] == "offline":
            raise
        print(
            f"warning: W&B is offline from here on: {' '.join(str(error).split())}; "
            f"send it later with wandb sync {options['dir']}/wandb/offline-run-*",
            file=sys.stderr,
            flush=True,
        )
        wandb.teardown()  # W&B's service process still holds the failed run
        return _init({**options, "mode": "offline", "resume": "allow"})


def _init(options: dict[str, Any]) -> Any:
    return wandb.init(
        **options,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        ),
    )


if __name__ == "__main__":
    main()
