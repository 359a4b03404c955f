"""`underpaint` in a process that torchrun started; the one of rank 1 is killed at a step of the first start."""

import os
import sys

import killed

import underpaint.cli

if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        killed.arm("step", 7)
    sys.exit(underpaint.cli.main(sys.argv[1:]))
