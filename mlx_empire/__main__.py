"""`python -m mlx_empire`: see `cli`."""

import sys

from mlx_empire.cli import main

if __name__ == "__main__":
    sys.exit(main())
