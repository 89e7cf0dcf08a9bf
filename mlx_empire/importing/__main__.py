"""`python -m mlx_empire.importing`: see `command`."""

import sys

from mlx_empire.importing.command import main

if __name__ == "__main__":
    sys.exit(main())
