"""A micro model to generate with, its tables wherever they may be, and the same text by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from micro import micro

from engram_jax.hashing.addressing import address, sites
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.inference import caches, stages
from engram_jax.inference.device_rows import DeviceRows
from engram_jax.inference.engine import Engine, Request
from engram_jax.model import transformer
from engram_jax.model.documents import documents
from engram_jax.offload.disk import DiskTable
from engram_jax.offload.file import TableWriter, table_info
from engram_jax.offload.formats import RowFormat
from engram_jax.offload.host import HostTable
from engram_jax.offload.prefetch import HostRows
from engram_jax.settings import changed
from engram_jax.tables.layout import gather_rows, layout_of

VOCAB, PAD, END = 300, 2, 7
SLOTS, CHUNK, LENGTH = 3, 4, 32

MODEL = changed(micro("none").model, {
    "depth": 3, "engram.layers": (1, 2), "moe.dense_layers": 1})
ISOLATED = changed(MODEL, {
    "moe": None, "streams": 1, "isolate_documents": True, "depth": 2, "engram.layers": (1,),
    "engram.max_order": 4, "engram.rows_per_head": (64, 128, 64)})
PLAIN = changed(MODEL, {"moe": None, "streams": 1, "engram": None, "depth": 1})
FIRST = changed(PLAIN, {"engram": MODEL.engram, "engram.layers": (0,)})


class Parts(NamedTuple):
    """Of a model: parameters, none of them zero, router biases, tables, addressing."""

    params: dict
    bias: list
    tables: dict
    addressing: object


@functools.cache
def parts(model):
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    params = structure.unflatten([
        jnp.asarray(random.standard_normal(leaf.shape) * max(leaf.shape[-2:-1] or (1,)) ** -0.5,
                    jnp.float32) for leaf in leaves])
    tables = {site.name: jnp.asarray(random.standard_normal(layout_of(site).shape), jnp.float32)
              for site in sites(model)}
    return Parts(params, transformer.init_router_bias(model), tables,
                 address(model, CompressedVocabulary(np.arange(VOCAB) // 2), PAD))


def table_array(model, site):
    """A site's rows in order, float32 [R, C]."""
    layout = layout_of(site)
    return np.asarray(layout.gather(parts(model).tables[site.name], jnp.arange(layout.rows)))


@functools.cache
def device_rows(model):
    return DeviceRows(model, parts(model).addressing, parts(model).tables, isolates(model))


def isolates(model):
    """The token behind which a document begins, if the model cares."""
    return END if model.isolate_documents else None


def host_tables(model, dtype="float32"):
    homes = {}
    for site in sites(model):
        form = RowFormat(dtype, site.dim)
        homes[site.name] = HostTable(form, form.pack(table_array(model, site)))
    return homes


def disk_tables(model, folder, dtype="float32"):
    homes = {}
    for site in sites(model):
        info = table_info(parts(model).addressing, site.name, dtype)
        path = folder / f"{site.name}.{dtype}.table"
        with TableWriter(path, info) as writer:
            writer.write(info.format.pack(table_array(model, site)))
        homes[site.name] = DiskTable.open(path, expect=info, check="read")
    return homes


def host_rows(model, homes=None, cache_bytes=0):
    homes = host_tables(model) if homes is None else homes
    return HostRows(parts(model).addressing, homes, isolates(model), cache_bytes)


def engine(model, rows, **settings):
    params, bias, _, _ = parts(model)
    return Engine(model, params, bias, rows, **{
        "pad_id": PAD, "end_id": END, "slots": SLOTS, "length": LENGTH, "chunk": CHUNK,
        **settings})


def generated(model, rows, requests, **settings):
    return engine(model, rows, **settings).generate(requests)


def prompt(length, seed=0):
    """Tokens without the one that ends a document."""
    random = np.random.default_rng([*np.ravel(seed), length])
    return tuple(int(token) for token in random.integers(END + 1, VOCAB, length))


def greedy(prompts, tokens):
    return [Request(prompt=ids, tokens=tokens) for ids in prompts]


@functools.cache
def _whole(model):
    params, bias, tables, addressing = parts(model)

    def logits(tokens_BT):
        starts_BT = jnp.pad(tokens_BT[:, :-1] == END, ((0, 0), (1, 0)))
        positions_BT = documents(starts_BT).position_BT if model.isolate_documents else None
        rows = gather_rows(model, tables, addressing.ids(tokens_BT, positions_BT))
        return transformer.apply(params, tokens_BT, rows, bias, model, starts_BT)[0]

    return jax.jit(logits)


def whole_logits(model, ids):
    """What `transformer.apply` gives for all of them, [T, V]."""
    padded = np.full((1, LENGTH), PAD, np.int32)
    padded[0, :len(ids)] = ids
    return np.asarray(_whole(model)(padded))[0, :len(ids)]


@functools.cache
def recomputed(model, ids, tokens, end_id=END):
    """Greedy tokens, each from the logits of the whole window."""
    window = list(ids)
    while len(window) < len(ids) + tokens and (len(window) == len(ids) or window[-1] != end_id):
        window.append(int(np.argmax(whole_logits(model, window)[-1])))
    return window[len(ids):]


_last_logits = jax.jit(stages.last_logits, static_argnames="model")


def read(model, cache, tokens, slot, before=()):
    """The cache after a slot has read some tokens, `before` being those that it has read already,
    and the logits behind them [V]."""
    params, bias, _, addressing = parts(model)
    past = addressing.history_length
    padded = np.array([PAD] * past + [*before, *tokens], np.int32)
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start:start + CHUNK]
        tokens_1T = np.full((1, CHUNK), PAD, np.int32)
        tokens_1T[0, :len(chunk)] = chunk
        count_1, at = np.array([len(chunk)], np.int32), np.array(slot, np.int32)
        here = len(before) + start
        rows = device_rows(model).request(tokens_1T, padded[None, here:here + past])
        first, *rest = stages.stages(model)
        keys, conv = list(cache.keys), dict(cache.conv)
        x_BTMD, keys[:first.stop], state, context = stages.begin(
            stages.stage_params(params, first), bias[:first.stop], keys[:first.stop], cache.state,
            tokens_1T, count_1, None, at, model=model, end_id=isolates(model))
        for stage in rest:
            part = slice(stage.start, stage.stop)
            x_BTMD, keys[part], conv[stage.layer] = stages.proceed(
                params["segments"][part], bias[part], keys[part], conv[stage.layer], x_BTMD,
                rows[stage.site], context, at, model=model, start=stage.start)
        cache = caches.Cache(keys, conv, state)
    return cache, np.asarray(_last_logits(params, x_BTMD, context, model))[0]
