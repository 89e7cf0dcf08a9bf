"""`python -m mlx_empire.launch`: see `command`."""

import sys

from mlx_empire.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
