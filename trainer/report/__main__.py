"""Write an HTML page about a run, and compare it with others.

Examples:
    python -m trainer.report runs/emoji/demo
    python -m trainer.report runs/emoji/wide runs/emoji/demo
"""

import sys

from trainer.report.job import report

if __name__ == "__main__":
    sys.exit(report(sys.argv[1:], about=__doc__))
