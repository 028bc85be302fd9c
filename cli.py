#!/usr/bin/env python3
"""`python cli.py ...` is the command `fitune ...`, from a checkout and without installing it."""

from fitune.__main__ import main

if __name__ == "__main__":
    main()
