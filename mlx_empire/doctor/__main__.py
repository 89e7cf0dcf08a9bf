"""`python -m mlx_empire.doctor`: see `command`."""

import sys

from mlx_empire.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
