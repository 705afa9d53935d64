"""The harness's own command, with runs as the model `engram_jax`."""

import sys

from engram_jax.errors import UserError


def main() -> int:
    """`lm_eval` with this library's model; exit code 2 where the harness is not installed."""
    try:
        from engram_jax.evaluation import harness  # noqa: F401  (registers the model)
    except UserError as error:
        print(f"engram-jax: {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
