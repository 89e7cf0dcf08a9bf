"""`python -m mlx_empire.evaluate`: see `command`."""

import sys

from mlx_empire.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
