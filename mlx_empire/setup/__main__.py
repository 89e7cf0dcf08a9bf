"""`python -m mlx_empire.setup`: see `command`."""

import sys

from mlx_empire.setup.command import main

if __name__ == "__main__":
    sys.exit(main())
