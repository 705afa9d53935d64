"""The Engram fusion as a Flax NNX module, for somebody else's network.

Shapes: B batch, T time, M streams, D width, H rows of a token, C columns of a row, P positions that
the convolution looks back.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.model.engram import as_streams, fuse, init_engram


class EngramFusion(nnx.Module):
    """Adds to the hidden state what the rows of its n-grams say.

    The rows are an input, so the module has no table: `engram_jax.tables` keeps one on a mesh,
    `engram_jax.offload` in host memory or on a disk. Whoever wants
    to see its gates calls `fuse`.

    Args:
      width: D of the hidden state.
      config: settings.
      streams: M, residual streams of the hidden state; 1 for an ordinary network.
      rngs: its stream `params` draws the projections.
    """

    def __init__(
        self, width: int, config: EngramConfig, *, streams: int = 1, rngs: nnx.Rngs
    ) -> None:
        self.config, self.streams = config, streams
        self.shape_PMD = (config.conv_reach, config.branches(streams), width)
        params = init_engram(rngs.params(), width, config.branches(streams), config)
        self.params = nnx.Dict({name: nnx.Param(leaf) for name, leaf in params.items()})
        self.conv: nnx.Cache | None = nnx.data(None)

    def init_cache(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        """Begin to decode: each call then goes on where the last one ended.

        The cache, an `nnx.Cache`, is what the convolution read at the last P positions.
        """
        self.conv = nnx.Cache(jnp.zeros((batch, *self.shape_PMD), dtype))

    def __call__(
        self, hidden: jax.Array, rows: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """The hidden state with what the memory gave added.

        Args:
          hidden: [B, T, D], or [B, T, M, D] for M residual streams.
          rows: the rows of each token, [B, T, H, C], any float dtype.
          position: int32 [B, T], each token's position in its document, at whose start the
            convolution stops; None lets it cross.

        Returns:
          The shape and dtype of `hidden`.

        Raises:
          UserError: shapes that do not go together, or rows that are bits and not numbers.
        """
        streams_BTMD = as_streams(hidden)
        params = {name: leaf[...] for name, leaf in self.params.items()}
        if self.conv is None or not self.config.conv_reach:
            fused = fuse(params, streams_BTMD, rows, self.config, position)
        else:
            fused = fuse(params, streams_BTMD, rows, self.config, position, self.conv[...])
            self.conv[...] = fused.last_taps(self.conv[...])
        return (streams_BTMD + fused.delta_BTMD).reshape(hidden.shape)
