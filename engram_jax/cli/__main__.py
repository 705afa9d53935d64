"""`python -m engram_jax.cli`."""

import sys

from engram_jax.cli.main import main

sys.exit(main())
