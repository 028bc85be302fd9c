"""Lets a virtual environment import what this interpreter can, behind its own packages.

    python tests/loaders/beside.py ENVIRONMENT

pip then installs there only what is missing here, as it does for a user who adds lm-eval to fitune.
"""

import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/loaders/beside.py ENVIRONMENT")
    own = sysconfig.get_path("purelib", vars={"base": sys.argv[1], "installed_base": sys.argv[1]})
    Path(own, "fitune-runs-on.pth").write_text(sysconfig.get_path("purelib") + "\n")
