"""`python -m mlx_empire.init`: see `command`."""

import sys

from mlx_empire.init.command import main

if __name__ == "__main__":
    sys.exit(main())
