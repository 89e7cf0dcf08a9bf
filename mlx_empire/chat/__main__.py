"""`python -m mlx_empire.chat`: see `command`."""

import sys

from mlx_empire.chat.command import main

if __name__ == "__main__":
    sys.exit(main())
