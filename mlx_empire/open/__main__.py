"""`python -m mlx_empire.open`: see `command`."""

import sys

from mlx_empire.open.command import main

if __name__ == "__main__":
    sys.exit(main())
