"""Products of ragged groups: each slot with the matrix of the group that it belongs to.

Slots lie group after group, each group's share in whole blocks; what comes after the last group's
slots belongs to nobody. Every device has its own way, and all give the same to rounding.

Shapes: P slots, W of them in a window, X in a block, Q blocks, E experts (groups), C slots in a
piece, G pieces in a batch, D and F widths.
"""

import jax
import jax.numpy as jnp

# Slots of an expert that are multiplied at a time, of its even share: more than that, so that once
# does for loads that are nearly even.
SHARE_PERCENT = 120
FURTHER = 4  # a batch of further pieces has one for every so many experts


def ragged_product(
    x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    """Each slot times its expert's matrix, [P, F] in x's dtype; anything in slots of nobody.

    On TPUs that is `jax.lax.ragged_dot`, a kernel. On GPUs and CPUs XLA expands it to a product of
    every slot with every expert. So there a GPU multiplies batches of matrices (`in_batches`); and
    where there are fewer blocks than experts, as in decoding, and on CPUs, block after block is
    multiplied with its own expert's matrix (`in_blocks`), which copies none.

    Args:
      x_PD: slots.
      weight_EDF: a matrix for each expert.
      padded_E: int32, slots of each expert, whole blocks.
      expert_Q: int32, the expert of each block.
    """
    on_gpus = in_batches if expert_Q.size >= weight_EDF.shape[0] else in_blocks
    return jax.lax.platform_dependent(
        x_PD, weight_EDF, padded_E, expert_Q,
        tpu=_ragged, cuda=on_gpus, rocm=on_gpus, default=in_blocks)


def _ragged(
    x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    del expert_Q
    return ragged_matmul(x_PD, weight_EDF, padded_E)


@jax.custom_vjp
def in_blocks(
    x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    """Each slot times its expert's matrix, block after block, [P, F] in x's dtype.

    Only blocks that are in use are visited; the gradient of a matrix is summed over its blocks in
    float32.
    """
    return _each_block("xd,df->xf", x_PD, weight_EDF, padded_E, expert_Q)


def _in_blocks_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], grad_PF: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    x_PD, weight_EDF, padded_E, expert_Q = saved
    grad_PD = _each_block("xf,df->xd", grad_PF, weight_EDF, padded_E, expert_Q)
    size = x_PD.shape[0] // expert_Q.size

    def add(block: jax.Array, total_EDF: jax.Array) -> jax.Array:
        x_XD, grad_XF = (jax.lax.dynamic_slice_in_dim(array, block * size, size)
                         for array in (x_PD, grad_PF))
        product_DF = jnp.einsum("xd,xf->df", x_XD, grad_XF, preferred_element_type=jnp.float32)
        return total_EDF.at[expert_Q[block]].add(product_DF, mode="promise_in_bounds")

    total_EDF = jax.lax.fori_loop(
        0, jnp.sum(padded_E) // size, add, jnp.zeros(weight_EDF.shape, jnp.float32))
    return grad_PD, total_EDF.astype(weight_EDF.dtype), None, None


in_blocks.defvjp(lambda *arguments: (in_blocks(*arguments), arguments), _in_blocks_backward)


def _each_block(
    product: str, x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    """`product` of each block in use with its expert's matrix; zeros in the slots after them."""
    size = x_PD.shape[0] // expert_Q.size

    def multiply(block: jax.Array, out_PF: jax.Array) -> jax.Array:
        weight_DF = jax.lax.dynamic_index_in_dim(weight_EDF, expert_Q[block], keepdims=False)
        x_XD = jax.lax.dynamic_slice_in_dim(x_PD, block * size, size)
        out_XF = jnp.einsum(product, x_XD, weight_DF.astype(x_XD.dtype))
        return jax.lax.dynamic_update_slice_in_dim(out_PF, out_XF, block * size, 0)

    width = weight_EDF.shape[2 if product.endswith("f") else 1]
    start_PF = jnp.zeros((x_PD.shape[0], width), x_PD.dtype)
    return jax.lax.fori_loop(0, jnp.sum(padded_E) // size, multiply, start_PF)


@jax.custom_vjp
def in_batches(
    x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    """`ragged_product` as products of batches of matrices: C slots of every expert, then, G at a
    time, further pieces of C slots of experts that have more, with copies of their matrices.

    However lopsided loads are, the further batches together have at most the slots of the first;
    zeros in slots of nobody. The gradient of a matrix is summed over pieces in float32.
    """
    return _each_batch("ecd,edf->ecf", x_PD, weight_EDF, padded_E, expert_Q)


def _in_batches_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], grad_PF: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    x_PD, weight_EDF, padded_E, expert_Q = saved
    grad_PD = _each_batch("ecf,edf->ecd", grad_PF, weight_EDF, padded_E, expert_Q)
    pieces = _Pieces(padded_E, x_PD.shape[0], expert_Q.size)

    def products(slot_GC: jax.Array) -> jax.Array:
        return jnp.einsum("gcd,gcf->gdf", _at(x_PD, slot_GC), _at(grad_PF, slot_GC),
                          preferred_element_type=jnp.float32)

    def add(number: jax.Array, total_EDF: jax.Array) -> jax.Array:
        expert_G, slot_GC = pieces.further(number)
        mine_GE = jax.nn.one_hot(expert_G, padded_E.size)  # no scatter: the same bits each run
        return total_EDF + jnp.einsum("gdf,ge->edf", products(slot_GC), mine_GE,
                                      precision=jax.lax.Precision.HIGHEST)

    total_EDF = jax.lax.fori_loop(0, pieces.batches(), add, products(pieces.first()))
    return grad_PD, total_EDF.astype(weight_EDF.dtype), None, None


in_batches.defvjp(lambda *arguments: (in_batches(*arguments), arguments), _in_batches_backward)


def _each_batch(
    product: str, x_PD: jax.Array, weight_EDF: jax.Array, padded_E: jax.Array, expert_Q: jax.Array
) -> jax.Array:
    """`product` of each slot in use with its expert's matrix."""
    slots, weight_EDF = x_PD.shape[0], weight_EDF.astype(x_PD.dtype)
    pieces = _Pieces(padded_E, slots, expert_Q.size)

    def placed(out_PF: jax.Array, slot_GC: jax.Array, weight_GDF: jax.Array) -> jax.Array:
        return out_PF.at[slot_GC].set(jnp.einsum(product, _at(x_PD, slot_GC), weight_GDF),
                                      mode="drop", unique_indices=True)

    def multiply(number: jax.Array, out_PF: jax.Array) -> jax.Array:
        expert_G, slot_GC = pieces.further(number)
        return placed(out_PF, slot_GC, weight_EDF[expert_G])

    width = weight_EDF.shape[2 if product.endswith("f") else 1]
    start_PF = jnp.zeros((slots, width), x_PD.dtype)
    return jax.lax.fori_loop(
        0, pieces.batches(), multiply, placed(start_PF, pieces.first(), weight_EDF))


def _at(x_PD: jax.Array, slot_GC: jax.Array) -> jax.Array:
    return x_PD.at[slot_GC].get(mode="fill", fill_value=0)


class _Pieces:
    """Every expert's slots in pieces of C: the first of each, and the further ones, G at a time.

    Slots are int32 [pieces, C]; where a piece is not full they are numbers from P on, each its own.
    """

    def __init__(self, padded_E: jax.Array, slots: int, blocks: int):
        block, experts = slots // blocks, padded_E.size
        share = -(-slots * SHARE_PERCENT // (100 * experts * block)) * block
        self._slots, self._capacity = slots, min(slots, share)
        self._count = max(1, experts // FURTHER)  # rounded up, 55 experts' could be too large
        self._padded_E = padded_E
        self._start_E = jnp.cumsum(padded_E) - padded_E
        self._more_E = jnp.maximum(-(-padded_E // self._capacity) - 1, 0)
        self._stop_E = jnp.cumsum(self._more_E)

    def first(self) -> jax.Array:
        expert_E = jnp.arange(self._padded_E.size, dtype=jnp.int32)
        return self._slots_of(expert_E, jnp.zeros_like(expert_E))

    def batches(self) -> jax.Array:
        """How many there are of further pieces."""
        return -(-self._stop_E[-1] // self._count)

    def further(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts, int32 [G], and slots of a batch of further pieces."""
        piece_G = number * self._count + jnp.arange(self._count, dtype=jnp.int32)
        expert_G = jnp.sum(piece_G[:, None] >= self._stop_E[None], axis=1, dtype=jnp.int32)
        expert_G = jnp.minimum(expert_G, self._stop_E.size - 1)
        nth_G = 1 + piece_G - (self._stop_E - self._more_E)[expert_G]
        return expert_G, self._slots_of(expert_G, nth_G)

    def _slots_of(self, expert_G: jax.Array, nth_G: jax.Array) -> jax.Array:
        at_GC = (nth_G * self._capacity)[:, None] + jnp.arange(
            self._capacity, dtype=jnp.int32)[None]
        beyond_GC = self._slots + jnp.arange(at_GC.size, dtype=jnp.int32).reshape(at_GC.shape)
        return jnp.where(at_GC < self._padded_E[expert_G][:, None],
                         self._start_E[expert_G][:, None] + at_GC, beyond_GC)


@jax.custom_vjp
def ragged_matmul(x_PD: jax.Array, weight_EDF: jax.Array, size_E: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot` in x's dtype whose gradient costs what it should, whatever libtpu there
    is; that of the matrices is summed in float32 and has their dtype."""
    return jax.lax.ragged_dot(x_PD, weight_EDF.astype(x_PD.dtype), size_E)


def _ragged_forward(
    x_PD: jax.Array, weight_EDF: jax.Array, size_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    narrow_EDF, dtype_0 = weight_EDF.astype(x_PD.dtype), jnp.zeros(0, weight_EDF.dtype)
    return ragged_matmul(x_PD, narrow_EDF, size_E), (x_PD, narrow_EDF, size_E, dtype_0)


def _ragged_backward(
    saved: tuple[jax.Array, ...], grad_PF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_PD, weight_EDF, size_E, dtype_0 = saved
    # The kernel wants the weights transposed: not before the gradient is there.
    weight_EDF, grad_PF = jax.lax.optimization_barrier((weight_EDF, grad_PF))
    grad_PD = jax.lax.ragged_dot(grad_PF, jnp.swapaxes(weight_EDF, 1, 2), size_E)
    outer_EDF = jax.lax.platform_dependent(
        x_PD, grad_PF, size_E, tpu=_outer_on_tpus, default=ragged_outer)
    return grad_PD, outer_EDF.astype(dtype_0.dtype), None


ragged_matmul.defvjp(_ragged_forward, _ragged_backward)


def _outer_on_tpus(x_PD: jax.Array, grad_PF: jax.Array, size_E: jax.Array) -> jax.Array:
    """`ragged_outer` by XLA's kernel, which libtpu 0.0.50 (of jax 0.12) has; 0.0.42 (of jax 0.10)
    has none and makes it a product of every slot with every expert."""
    if jax.__version_info__ < (0, 12):
        return ragged_outer(x_PD, grad_PF, size_E)
    return kernel_outer(x_PD, grad_PF, size_E)


def kernel_outer(x_PD: jax.Array, grad_PF: jax.Array, size_E: jax.Array) -> jax.Array:
    """`ragged_outer` as one operation of JAX; slots after the last expert's count for nothing."""
    slots = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[])
    return jax.lax.ragged_dot_general(
        x_PD, grad_PF, size_E, slots, preferred_element_type=jnp.float32)


def ragged_outer(x_PD: jax.Array, grad_PF: jax.Array, size_E: jax.Array) -> jax.Array:
    """Each expert's x^T grad over its slots, [E, D, F] float32.

    Expert after expert, a window of slots at a time, wide enough that one does for an expert whose
    load is near the mean; what the window shows of others is masked.
    """
    slots, experts = x_PD.shape[0], size_E.size
    width = min(slots, -(-slots * SHARE_PERCENT // (100 * experts * 128)) * 128)
    stop_E = jnp.cumsum(size_E)

    def window(start: jax.Array, stop: jax.Array) -> jax.Array:
        at = jnp.clip(start, 0, slots - width)
        slot_W1 = at + jnp.arange(width, dtype=jnp.int32)[:, None]
        mine_W1 = (slot_W1 >= start) & (slot_W1 < stop)
        x_WD, grad_WF = (jnp.where(mine_W1, jax.lax.dynamic_slice_in_dim(array, at, width), 0)
                         for array in (x_PD, grad_PF))
        return jnp.einsum("wd,wf->df", x_WD, grad_WF, preferred_element_type=jnp.float32)

    def expert(_: None, bounds: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        start, stop = bounds
        total_DF = jax.lax.while_loop(
            lambda carry: carry[0] < stop,
            lambda carry: (carry[0] + width, carry[1] + window(carry[0], stop)),
            (start + width, window(start, stop)))[1]
        return None, total_DF

    return jax.lax.scan(expert, None, (stop_E - size_E, stop_E))[1]
