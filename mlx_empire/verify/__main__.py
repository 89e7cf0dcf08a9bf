"""`python -m mlx_empire.verify`: see `command`."""

import sys

from mlx_empire.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
