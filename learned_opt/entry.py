"""The `learned-opt` command. What it needs takes seconds to import: Ctrl-C is handled before."""

from __future__ import annotations

from learned_opt.interrupts import interruptible


def main() -> None:
    """Runs the command of the process's arguments."""
    with interruptible():
        from learned_opt import cli  # here: it imports torch

        cli.main()


if __name__ == "__main__":
    main()
