"""What `fitune`, `python -m fitune` and `python cli.py` start."""

import sys


def main() -> None:
    """The command line; Ctrl-C ends it with one line even while it is imported, as does a package that is missing."""
    try:
        from fitune.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        if package == "fitune" or "--debug" in sys.argv:
            raise
        from fitune.config.shipped import CHECKOUT

        instead = "make setup, then source .venv/bin/activate" if CHECKOUT else "pip install --force-reinstall fitune"
        sys.exit(f"error: {package} is not installed for {sys.executable}; run: {instead}")


if __name__ == "__main__":
    main()
