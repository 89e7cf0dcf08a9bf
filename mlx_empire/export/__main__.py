"""`python -m mlx_empire.export`: see `command`."""

import sys

from mlx_empire.export.command import main

if __name__ == "__main__":
    sys.exit(main())
