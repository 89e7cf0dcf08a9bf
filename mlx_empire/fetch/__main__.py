"""`python -m mlx_empire.fetch`: see `command`."""

import sys

from mlx_empire.fetch.command import main

if __name__ == "__main__":
    sys.exit(main())
