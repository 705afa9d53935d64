"""What TPUs and GPUs compute in another order than CPUs, and what a backward pass keeps, is the
same."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engram_jax import recipes
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig
from engram_jax.errors import UserError
from engram_jax.hashing.addressing import sites
from engram_jax.model import hyper_connections, moe, parameters, transformer
from engram_jax.model.moe import experts_here, experts_weighed_first
from engram_jax.model.sent_experts import SentExperts
from engram_jax.tables.layout import TableLayout
from engram_jax.training import placement
from engram_jax.training.fsdp import AXES

pytestmark = pytest.mark.usefixtures("compilations")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PRE, POST = abs(random(2, 5, 4)), abs(random(2, 5, 4, seed=1))
RESIDUAL, X = abs(random(2, 5, 4, 4, seed=2)), random(2, 5, 4, 8, seed=3)
PAIRS = {
    "read": (hyper_connections._read, hyper_connections._read_joined, (PRE, X)),
    "written": (hyper_connections._written, hyper_connections._written_joined,
                (RESIDUAL, POST, X, random(2, 5, 8, seed=4))),
    "projected": (functools.partial(hyper_connections._projected, 1e-6),
                  functools.partial(hyper_connections._projected_at_once, 1e-6),
                  (random(2, 5, 32, seed=5), random(32, 24, seed=6))),
    "rounds of few tokens on GPUs": (
        functools.partial(hyper_connections._rounds, 20),
        functools.partial(hyper_connections._rounds_of_entries, 20), (RESIDUAL + 0.1,)),
    "rounds on GPUs": (functools.partial(hyper_connections._rounds, 20),
                       functools.partial(hyper_connections._rounds_unrolled, 20),
                       (RESIDUAL + 0.1,)),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "rounds of few tokens on GPUs" else name
    for name in PAIRS])
def test_streams_on_accelerators_are_those_on_a_cpu_and_so_are_gradients(name):
    here, there, arguments = PAIRS[name]

    def with_gradients(function):
        out, back = jax.vjp(function, *arguments)
        return out, back(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    ours, theirs = (jax.jit(functools.partial(with_gradients, f))() for f in (there, here))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, theirs)


@pytest.mark.parametrize(("platform", "loops", "products"), [
    ("cpu", 1, 3), ("tpu", 1, 1), ("cuda", 0, 1), ("rocm", 0, 1)])
def test_each_device_has_its_way(platform, loops, products):
    """Loops of Sinkhorn; products with matrices: the projection, and on CPUs the streams'."""
    params = parameters.values(hyper_connections.mixing_parameters(jax.random.key(0), 8, 4))
    text = jax.jit(lambda params, x: hyper_connections.connect(
        params, x, lambda x: (x, None), 20, 1e-6)[0]).trace(params, X).lower(
            lowering_platforms=(platform,)).as_text()
    assert (text.count("stablehlo.while"), text.count("stablehlo.dot_general")) == (loops, products)


MODEL = ModelConfig(
    vocab_size=40, width=16, depth=3, ffn=16, streams=2, compute_dtype="float32", remat="none",
    attention=AttentionConfig(heads=1, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(experts=4, top_k=2, expert_ffn=8, dense_layers=1),
    engram=EngramConfig(layers=(1,), rows_per_head=(31, 37), heads=2, head_dim=8, shards=4))


@functools.cache
def gradients(remat, layout="joined"):
    model = dataclasses.replace(MODEL, remat=remat, stream_layout=layout)
    params, site = transformer.init(model, jax.random.key(0)), sites(model)[0]
    rows = {site.name: random(1, 8, site.hash_config.total_heads, site.dim)}

    def loss(params, rows):
        logits, _ = transformer.apply(params, jnp.arange(8)[None], rows,
                                      transformer.init_router_bias(model), model)
        return jnp.sum(logits * jnp.sin(logits))

    program = jax.jit(jax.grad(loss, argnums=(0, 1)))
    products = str(jax.make_jaxpr(jax.grad(loss))(params, rows)).count("dot_general")
    return program(params, rows), products


@pytest.mark.parametrize(("remat", "layout"), [
    ("block", "joined"), ("ffn", "joined"), ("outputs", "joined"), ("none", "apart"),
    ("outputs", "apart")])
@pytest.mark.slow
def test_what_is_kept_and_how_streams_lie_changes_no_gradient(remat, layout):
    # The largest are 250, of which float32 holds 3e-5.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
                 gradients(remat, layout)[0], gradients("none")[0])


@pytest.mark.parametrize(("platform", "streams", "layout", "there"), [
    ("tpu", 4, "auto", "apart"), ("tpu", 1, "auto", "joined"), ("tpu", 4, "joined", "joined"),
    ("cpu", 4, "auto", "joined"), ("gpu", 2, "auto", "joined"), ("cpu", 2, "apart", "apart")])
def test_how_streams_lie_is_for_the_device_to_say(platform, streams, layout, there):
    model = dataclasses.replace(MODEL, streams=streams, stream_layout=layout)
    device = types.SimpleNamespace(platform=platform)
    assert hyper_connections.stream_layout(model, device) == there


@pytest.mark.parametrize(("function", "asked"), [
    (lambda x: SentExperts(axis="expert", devices=4, everywhere=AXES, to_all=True)._tokens(x, None),
     {"tpu": ("LayoutConstraint", 2)}),
    (lambda x: TableLayout(rows=64, dim=8, shards=1).put(jnp.zeros((1, 64, 8)), jnp.arange(32), x),
     {"tpu": ("optimization_barrier", 1)}),
    (lambda x: moe.added_up(x, jnp.zeros((4, 2), jnp.int32)),
     {"tpu": ("optimization_barrier", 1)})],
    ids=["gathered tokens", "rows that are written", "sums of choices"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_what_a_tpu_alone_is_asked_for(function, asked, platform):
    """Tokens that lie row by row before and after they are gathered; rows that are made first."""
    mesh = placement.make_mesh(1, 1, expert=4)
    text = jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    ).trace(jnp.ones((32, 8))).lower(lowering_platforms=(platform,)).as_text()
    word, count = asked.get(platform, ("LayoutConstraint", 0))
    assert text.count(word) == count
    assert (text.count("optimization_barrier") > 0) == (word == "optimization_barrier")


@pytest.mark.parametrize(("streams", "layout", "line"), [
    (2, "beside", "one of auto, joined, apart"), (1, "apart", "auto where there is one stream"),
    (1, "joined", "auto where there is one stream")])
def test_layouts_that_are_refused(streams, layout, line):
    with pytest.raises(UserError, match=rf"model.stream_layout = '{layout}': must be {line}"):
        dataclasses.replace(MODEL, streams=streams, stream_layout=layout)


def test_a_run_is_settled_for_its_mesh():
    """A program that a CPU compiles for TPUs has the layout of TPUs, in every segment."""
    run = recipes.recipe("engram-27b")
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5p")
    mesh = types.SimpleNamespace(devices=np.array([tpu], object))
    assert placement.settled(run, mesh).model.stream_layout == "apart"
    assert placement.settled(run, placement.single_mesh()).model.stream_layout == "joined"
    assert placement.settled(recipes.recipe("tiny"), mesh).model.stream_layout == "auto"


@pytest.mark.parametrize(("layout", "carried"), [
    ("apart", [(1, 8, 16)] * 2), ("joined", [(1, 8, 2, 16)])])
def test_segments_carry_streams_as_they_are_told_to(monkeypatch, layout, carried):
    """One block without experts, then a fusion and two blocks with them; two sub-layers each."""
    model, seen = dataclasses.replace(MODEL, stream_layout=layout), []
    connect = hyper_connections.connect
    monkeypatch.setattr(hyper_connections, "connect", lambda params, x, *args, **kwargs: (
        seen.append([leaf.shape for leaf in jax.tree.leaves(x)]),
        connect(params, x, *args, **kwargs))[1])
    site = sites(model)[0]
    jax.eval_shape(lambda: transformer.apply(
        transformer.init(model, jax.random.key(0)), jnp.arange(8)[None],
        {site.name: jnp.ones((1, 8, site.hash_config.total_heads, site.dim))},
        transformer.init_router_bias(model), model))
    assert seen == [carried] * 4


def test_of_streams_apart_what_mixes_them_is_kept():
    """As many products with matrices, and loops of Sinkhorn, as where nothing is computed again."""
    params = parameters.values(hyper_connections.mixing_parameters(jax.random.key(0), 8, 4))
    x = hyper_connections.laid_out(jnp.asarray(X), "apart")

    def counts(remat):
        def loss(params, x):
            return sum(map(jnp.sum, remat(lambda params, x: hyper_connections.connect(
                params, x, lambda x: (x, None), 20, 1e-6)[0])(params, x)))

        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x))
        return text.count("dot_general"), text.count("scan[")

    kept = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(
        hyper_connections.MIXING))
    assert counts(kept) == counts(lambda run: run)
    assert all(np.greater(counts(jax.checkpoint), counts(kept)))


@pytest.mark.slow
def test_what_is_kept_is_not_computed_again():
    """Of a block attention's last product, the FFN's and the experts' are spared."""
    counts = [gradients(remat)[1] for remat in ("none", "outputs", "ffn", "block")]
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts)


@pytest.mark.parametrize(("tokens", "way"), [
    (hyper_connections.FEW_TOKENS, "_rounds_of_entries"),
    (hyper_connections.FEW_TOKENS + 1, "_rounds_unrolled")])
def test_sinkhorn_of_few_tokens_has_its_own_way_on_gpus(monkeypatch, tokens, way):
    """Many must not have it: its gradient would take a minute to compile."""
    taken = []
    for name in ("_rounds_of_entries", "_rounds_unrolled"):
        monkeypatch.setattr(hyper_connections, name,
                            lambda rounds, logits, name=name: (taken.append(name), logits)[1])
    jax.jit(lambda logits: hyper_connections.sinkhorn(logits, 20)).trace(
        jnp.ones((1, tokens, 4, 4))).lower(lowering_platforms=("cuda",))
    assert set(taken) == {way}


def test_what_is_in_empty_slots_counts_for_nothing(monkeypatch):
    """Loads that leave slots empty: all is as with zeros there, gradients, too."""
    x_ND, (gate, up, down) = random(5, 8), (random(4, 8, 16), random(4, 8, 16), random(4, 16, 8))
    experts = {"gate": gate, "up": up, "down": down}
    choice_NK = jnp.asarray([[0, 1], [0, 3], [3, 0], [0, 1], [3, 1]])

    def loss(experts, x_ND, weight_NK):
        out_ND, _ = experts_weighed_first(experts, x_ND, choice_NK, weight_NK, 4)
        return jnp.sum(out_ND * jnp.cos(out_ND)), out_ND

    def made():
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
            experts, x_ND, jnp.abs(random(5, 2)))

    seen, to_slots = [], moe.to_slots
    monkeypatch.setattr(moe, "to_slots", lambda x, groups, empty="fill": (
        seen.append(empty), to_slots(x, groups))[1])
    zeros = made()
    assert "clip" in seen
    monkeypatch.undo()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
                 made(), zeros)


@pytest.mark.parametrize("routed", [experts_here, experts_weighed_first])
def test_what_is_weighed_first_has_no_array_with_a_row_for_each_choice(routed):
    """Nor have its gradients. Meshes of TPUs ask for it, other ones do not."""
    experts = {"gate": jnp.ones((4, 8, 16)), "up": jnp.ones((4, 8, 16)),
               "down": jnp.ones((4, 16, 8))}

    def loss(experts, x_ND, weight_NK):
        return jnp.sum(routed(experts, x_ND, jnp.zeros((32, 3), jnp.int32), weight_NK, 4)[0] ** 2)

    traced = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(
        experts, jnp.ones((32, 8)), jnp.ones((32, 3))))
    assert ("f32[32,3,8]" in traced) == (routed is experts_here)


@pytest.mark.parametrize(("platform", "routed"), [
    ("tpu", experts_weighed_first), ("cpu", experts_here), ("gpu", experts_here)])
def test_a_mesh_of_tpus_weighs_first(platform, routed):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(shape={"expert": 1}, devices=np.array([[[[device]]]]))
    assert placement.routed(recipes.recipe("moe-27b"), mesh) is routed


def test_choices_add_up_in_float32():
    """In bfloat16 each 1 would be lost: 256 and 1 are 256 there."""
    rows_PD = jnp.array([[256], [1], [1], [2]], jnp.bfloat16)
    sums = moe.added_up(rows_PD, jnp.array([[0, 1, 2], [3, 1, 4]]))
    assert sums.dtype == jnp.bfloat16
    assert sums.astype(jnp.float32).tolist() == [[258], [3]]


def test_what_mixes_streams_may_be_joined_with_the_forward_pass():
    model = dataclasses.replace(MODEL, streams=2)
    params = hyper_connections.mixing_parameters(jax.random.key(0), 8, 2)
    streams = tuple(jnp.ones((1, 4, 8)) for _ in range(2))
    traced = str(jax.make_jaxpr(lambda x: hyper_connections.connect(
        parameters.values(params), x, lambda x: (x, None), model.sinkhorn_rounds, 1e-6)[0])(
            streams))
    assert traced.count("prevent_cse=False") == 2
    assert "prevent_cse=True" not in traced
