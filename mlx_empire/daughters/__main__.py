"""`python -m mlx_empire.daughters`: see `command`."""

import sys

from mlx_empire.daughters.command import main

if __name__ == "__main__":
    sys.exit(main())
