"""The entry point of the `learned-opt` command.

It handles Ctrl-C before the slow imports of what the command needs.
"""

from __future__ import annotations

import os
import sys

from learned_opt.interrupts import interruptible


def main() -> None:
    """Runs the command in the process's arguments."""
    try:
        with interruptible():
            from learned_opt import cli  # here: it imports torch

            try:
                cli.main()
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)


if __name__ == "__main__":
    main()
