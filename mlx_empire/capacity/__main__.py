"""`python -m mlx_empire.capacity`: see `command`."""

import sys

from mlx_empire.capacity.command import main

if __name__ == "__main__":
    sys.exit(main())
