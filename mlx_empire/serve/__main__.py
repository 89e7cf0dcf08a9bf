"""`python -m mlx_empire.serve`: see `command`."""

import sys

from mlx_empire.serve.command import main

if __name__ == "__main__":
    sys.exit(main())
