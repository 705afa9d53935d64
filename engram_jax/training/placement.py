"""The mesh of a run: its axes, and where each part of the state lies.

Axes `data`, `fsdp`, `expert` and `sequence`; each may be 1. Tables are split over all, parameters
over `fsdp` and `expert`, sequences over the first three and each of them over the last
(`model.sequence`). Along `expert` tokens travel to experts, and not experts to tokens
(`model.sent_experts`). Nothing that is saved depends on the mesh.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from engram_jax.config import RunConfig, require
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import sites
from engram_jax.model import attention_kernels, hyper_connections, transformer
from engram_jax.model.moe import Routed, experts_here, experts_weighed_first
from engram_jax.model.sent_experts import SentExperts, pays_to_all
from engram_jax.settings import changed
from engram_jax.tables import collectives
from engram_jax.tables.layout import layout_of
from engram_jax.tables.local import LocalMemory
from engram_jax.training.fsdp import AXES, BATCH, EXPERT, FSDP, SEQUENCE, Split, split
from engram_jax.training.state import TrainState, abstract_state, row_optimizer


def make_mesh(
    data: int, fsdp: int, devices: Sequence[jax.Device] | None = None, expert: int = 1,
    sequence: int = 1,
) -> Mesh:
    """A mesh `data` x `fsdp` x `expert` x `sequence` of the given devices, or of the first of all
    that there are. On a slice those that share experts are a block of it.

    Raises:
      UserError: there are fewer devices, or some would be left over on a cluster; sequences would
        be split on a cluster.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, wanted = _written(data, fsdp, expert, sequence), data * fsdp * expert * sequence
    require(min(data, fsdp, expert, sequence) >= 1, "mesh", shape, "all sizes must be at least 1")
    require(sequence == 1 or jax.process_count() == 1, "mesh", shape,
            f"splits sequences, which {jax.process_count()} processes cannot yet: each reads whole "
            "ones")
    require(wanted <= len(devices), "mesh", shape,
            f"needs {wanted} devices, and there are {len(devices)}")
    require(wanted == len(devices) or jax.process_count() == 1, "mesh", shape,
            f"must use all {len(devices)} devices of the {jax.process_count()} processes")
    try:
        flat = jax.make_mesh(
            (data, fsdp * expert * sequence), AXES[:2], axis_types=(AxisType.Auto,) * 2,
            devices=devices[:wanted])
    except NotImplementedError as error:  # of a TPU slice
        raise UserError(f"mesh = {shape!r}: sizes must be products of the slice's own axes, as "
                        "4x16 is on a slice of 4x4x4 chips") from error
    # Of few chips `make_mesh` makes a ring, whose halves do not lie on a line.
    rows = [collectives.in_blocks(row, expert * sequence) for row in flat.devices.tolist()]
    return _mesh(np.array(rows), data, fsdp, expert, sequence)


def _mesh(devices: np.ndarray, *shape: int) -> Mesh:
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def chosen_mesh(shape: str | None = None) -> Mesh:
    """The mesh of `shape`, "DATAxFSDP", "DATAxFSDPxEXPERT" or "DATAxFSDPxEXPERTxSEQUENCE"; or else
    of $ENGRAM_MESH; or else all devices along fsdp.

    Raises:
      UserError: as `make_mesh`, or the shape is not two to four numbers.
    """
    shape = shape or os.environ.get("ENGRAM_MESH")
    if not shape:
        return make_mesh(1, len(jax.devices()))
    sizes = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?", shape)
    if sizes is None:
        raise UserError(f"mesh = {shape!r}: write it as DATAxFSDP, for example 1x8, or "
                        "DATAxFSDPxEXPERT, for example 1x2x4, or DATAxFSDPxEXPERTxSEQUENCE, for "
                        "example 1x4x1x2")
    return make_mesh(int(sizes[1]), int(sizes[2]), expert=int(sizes[3] or 1),
                     sequence=int(sizes[4] or 1))


def single_mesh() -> Mesh:
    """A mesh of this process's first device."""
    return _mesh(np.array(jax.local_devices()[:1]), 1, 1, 1, 1)


def reading_mesh(run: RunConfig, shape: str | None = None) -> Mesh:
    """The mesh on which a trained run is evaluated: as `chosen_mesh`, but one device where nobody
    named a mesh and all devices do not divide the run.

    Raises:
      UserError: as `chosen_mesh`.
    """
    mesh = chosen_mesh(shape)
    if shape or os.environ.get("ENGRAM_MESH"):
        return mesh
    try:
        check(run, mesh)
    except UserError:
        return single_mesh()
    return mesh


def serving_mesh(run: RunConfig, shape: str | None = None, tables: bool = True) -> Mesh:
    """The mesh on which a trained run generates and is looked into: as `chosen_mesh`, but this
    process's first device where nobody named a mesh; `tables` says whether they lie there, too.

    Raises:
      UserError: as `chosen_mesh`, or the mesh does not divide a table.
    """
    if not (shape or os.environ.get("ENGRAM_MESH")):
        return single_mesh()
    mesh = chosen_mesh(shape)
    for site in sites(run.model) if tables else ():
        shards = layout_of(site).shards
        require(shards % mesh.size == 0, "mesh", shape_of(mesh),
                f"has {mesh.size} devices, which must divide the {shards} shards of the run's "
                f"table {site.name}")
    return mesh


def shape_of(mesh: Mesh) -> str:
    """ "data x fsdp", as the command line takes it, and "x expert" where experts are shared or
    "x expert x sequence" where sequences are split."""
    return _written(*(mesh.shape[axis] for axis in AXES))


def _written(data: int, fsdp: int, expert: int, sequence: int) -> str:
    return (f"{data}x{fsdp}" + f"x{expert}" * (expert != 1 or sequence != 1)
            + f"x{sequence}" * (sequence != 1))


def check(run: RunConfig, mesh: Mesh) -> None:
    """Refuse a run that the mesh does not divide (UserError)."""
    devices, accumulate = mesh.size // mesh.shape[SEQUENCE], run.training.accumulate
    _check_stretches(run, mesh)
    batch = run.data.batch_size
    require(batch % devices == 0, "data.batch_size", batch,
            f"does not divide among the {devices} {'devices' * (devices == mesh.size) or 'groups'} "
            f"of the mesh {shape_of(mesh)}")
    require(batch // devices % max(1, accumulate) == 0, "training.accumulate", accumulate,
            f"does not divide the {batch // devices} sequences that each of {devices} devices has")
    moe, sharing = run.model.moe, mesh.shape[EXPERT]
    require(sharing <= (moe.experts if moe else 1), "mesh", shape_of(mesh),
            f"shares {moe.experts if moe else 'no'} experts among {sharing} devices")
    for site in sites(run.model):
        require(site.hash_config.keys != "shuffled" or batch > devices, "data.batch_size", batch,
                f"leaves each of {devices} devices one sequence, and with shuffled keys each needs "
                "a neighbour: set at least two for a device")
        layout_of(site).check_divides(mesh.size, f"{site.name}.shards")


def _check_stretches(run: RunConfig, mesh: Mesh) -> None:
    """Refuse sequences that the mesh cannot split."""
    count, length, heads = (
        mesh.shape[SEQUENCE], run.data.sequence_length, run.model.attention.heads)
    if count == 1:
        return
    require(heads % count == 0, "mesh", shape_of(mesh),
            f"splits sequences over {count} devices, which do not divide the {heads} heads of "
            "model.attention")
    reach = max([0, *(site.hash_config.max_order - 1 for site in sites(run.model))])
    if run.model.engram is not None:
        reach = max(reach, run.model.engram.conv_reach)
    require(length % count == 0 and length // count >= reach, "data.sequence_length", length,
            f"must be a multiple of the {count} devices of a sequence on the mesh "
            f"{shape_of(mesh)}, and leave each {reach} tokens, as far back as convolutions and "
            "n-grams look")
    for site in sites(run.model):
        require(site.hash_config.keys == "ngrams", "mesh", shape_of(mesh),
                f"splits sequences, and {site.name}.keys = {site.hash_config.keys!r} needs whole "
                "ones")


def settled(run: RunConfig, mesh: Mesh) -> RunConfig:
    """The run with attention's implementation and the streams' layout as they are on the mesh's
    devices.

    Raises:
      UserError: the one that the run names does not run there.
    """
    model, device = run.model, mesh.devices.flat[0]
    settings = {"model.attention.implementation": attention_kernels.chosen(
        model.attention, model.compute_dtype, model.isolate_documents, device)}
    if model.streams > 1:
        settings["model.stream_layout"] = hyper_connections.stream_layout(model, device)
    return changed(run, settings)


def param_split(run: RunConfig, mesh: Mesh) -> Split:
    """How the run's parameters are split."""
    sharing = mesh.shape[EXPERT]
    near = collectives.neighbours(list(mesh.devices[0, :, :, 0].flat))
    # Those that hold parts of the same experts are a part of the slice where others share them.
    return split(
        transformer.declared(run.model), mesh.shape[FSDP] * sharing, run.model.compute_dtype, near,
        sharing, near_fsdp=0 if sharing > 1 else near)


def routed(run: RunConfig, mesh: Mesh) -> Routed:
    """How tokens and experts come together on a mesh."""
    moe, devices = run.model.moe, mesh.shape[EXPERT]
    if moe is None or devices == 1:
        on_tpus = mesh.devices.flat[0].platform == "tpu"
        return experts_weighed_first if on_tpus else experts_here
    block = collectives.extent(list(mesh.devices[0, 0, :, 0]))
    return SentExperts(axis=EXPERT, devices=devices, everywhere=AXES,
                       to_all=pays_to_all(moe.top_k, devices, block))


def local_memory(run: RunConfig, mesh: Mesh) -> LocalMemory:
    """The run's tables as each device of the mesh sees them.

    What a device asks of each peer in a round is `training.row_capacity` of the even share of its
    ids (all of the share where it is not set).
    """
    tokens = run.data.batch_size * run.data.sequence_length // mesh.size
    return LocalMemory.sized(
        sites(run.model), row_optimizer(run), tokens, axes=AXES, devices=mesh.size,
        near=collectives.neighbours(list(mesh.devices.flat)),
        share=run.training.row_capacity or 1.0)


def state_specs(run: RunConfig, mesh: Mesh) -> TrainState:
    """The PartitionSpec of every leaf of the state."""
    abstract = abstract_state(run)
    params = param_split(run, mesh).specs(abstract.params)
    everywhere: Any = PartitionSpec()

    def of_table(leaf: Any) -> PartitionSpec:
        return PartitionSpec(AXES) if leaf.ndim else everywhere

    return TrainState(
        step=everywhere,
        params=params,
        router_bias=jax.tree.map(lambda _: everywhere, abstract.router_bias),
        opt_state=_like_params(abstract.opt_state, params),
        tables=jax.tree.map(of_table, abstract.tables),
        table_state=jax.tree.map(of_table, abstract.table_state),
    )


def _like_params(opt_state: Any, params: Any) -> Any:
    """The specs of an optimizer's state.

    A leaf at the end of whose path a parameter's path stands lies as that parameter does,
    everything else is everywhere.
    """
    of_param = dict(jax.tree_util.tree_leaves_with_path(params))

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        del leaf
        ends = (path[start:] for start in range(len(path)))
        return next((of_param[end] for end in ends if end in of_param), PartitionSpec())

    return jax.tree_util.tree_map_with_path(spec, opt_state)


def shardings(run: RunConfig, mesh: Mesh) -> TrainState:
    """The NamedSharding of every leaf of the state."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(run, mesh),
                        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def placed_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the run's state."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(run), shardings(run, mesh))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the whole mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()}
