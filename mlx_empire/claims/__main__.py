"""`python -m mlx_empire.claims`: see `command`."""

import sys

from mlx_empire.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
