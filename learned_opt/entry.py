"""The `learned-opt` command, which handles Ctrl-C before the imports, which take seconds."""

from __future__ import annotations

from learned_opt.interrupts import interruptible


def main() -> None:
    """Runs the command that the arguments of the process name."""
    with interruptible():
        from learned_opt import cli  # local, because it imports torch

        cli.main()


if __name__ == "__main__":
    main()
