"""`python -m mlx_dgemma.parity`."""

from .command import main

main()
