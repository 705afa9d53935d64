"""What the committed tables of the tiny scale were trained from."""

from engram_jax import recipes
from engram_jax.config import RunConfig
from engram_jax.settings import changed


def tiny() -> RunConfig:
    """`recipes.tiny` with row Adam, the default of its day, so that a table can be made again.

    Row-wise RMSProp, today's, trains better (experiments/row_optimizers); the small and paper
    scales have it, and `tokens` has each kind's best settings.
    """
    return changed(recipes.tiny(), {"optimizer.table_optimizer": "row_adam"})
