"""What `fitune`, `python -m fitune` and `python cli.py` start."""

import sys


def main() -> None:
    """The command line; Ctrl-C ends it with one line even while it is imported."""
    try:
        from fitune.cli import main as run_command_line
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    run_command_line()


if __name__ == "__main__":
    main()
