"""`python -m mlx_empire.train`: see `command`."""

import sys

from mlx_empire.train.command import main

if __name__ == "__main__":
    sys.exit(main())
