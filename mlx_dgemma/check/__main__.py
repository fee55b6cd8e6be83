"""`python -m mlx_dgemma.check`."""

from .command import main

main()
