"""`python -m engram_jax.cli`."""

import sys

from engram_jax.cli.main import main

if __name__ == "__main__":  # processes that a sweep starts import this
    sys.exit(main())
