"""`python -m mlx_empire.inspect`: see `command`."""

import sys

from mlx_empire.inspect.command import main

if __name__ == "__main__":
    sys.exit(main())
