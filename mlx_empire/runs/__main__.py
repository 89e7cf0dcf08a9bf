"""`python -m mlx_empire.runs`: see `command`."""

import sys

from mlx_empire.runs.command import main

if __name__ == "__main__":
    sys.exit(main())
