"""Controls: rows that say nothing of the text, as many and as often as the memory's."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
from micro import micro

from engram_jax.errors import UserError
from engram_jax.hashing.addressing import address
from engram_jax.hashing.compression import CompressedVocabulary
from engram_jax.hashing.controls import by_chance, of_neighbours
from engram_jax.hashing.host import HostHash
from engram_jax.settings import changed
from engram_jax.training import placement

VOCAB = 300
TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB, (4, 200)).astype(np.int32)


def model(keys):
    return changed(micro("none").model, {"engram.keys": keys})


def ids(keys, tokens_BT=TOKENS_BT):
    found = address(model(keys), CompressedVocabulary.identity(VOCAB), 2).ids(tokens_BT)
    return np.asarray(found["layer_0"])


def test_chance_is_the_same_again_and_looks_at_no_later_token():
    before = jax.jit(lambda x: by_chance(x, 97))(TOKENS_BT)
    np.testing.assert_array_equal(before, by_chance(jnp.asarray(TOKENS_BT), 97))
    changed = TOKENS_BT.copy()
    changed[1, 50] += 1
    after = np.asarray(by_chance(jnp.asarray(changed), 97))
    differs = after != np.asarray(before)
    assert not differs[[0, 2, 3]].any()
    assert not differs[1, :50].any()
    assert differs[1, 50:].mean() > 0.9


def test_chance_forgets_ngrams_and_uses_all_ids_alike():
    """A text that repeats one token gets new ids at every position; each id is as likely."""
    same = jnp.full((8, 4000), 7, jnp.int32) + jnp.arange(8, dtype=jnp.int32)[:, None]
    found = np.asarray(by_chance(same, 100))
    assert found.min() == 0
    assert found.max() == 99
    counts = np.bincount(found.ravel(), minlength=100)
    expected = found.size / 100
    assert np.sum((counts - expected) ** 2 / expected) < 149  # chi squared, 99 degrees, p = 0.001
    assert 0.005 < np.mean(found[:, 1:] == found[:, :-1]) < 0.015


def test_random_keys_do_not_come_back_with_their_ngram():
    twice_BT = np.concatenate([TOKENS_BT, TOKENS_BT], axis=1)
    memory, control = ids("ngrams", twice_BT), ids("random", twice_BT)
    assert (memory[:, 5:200] == memory[:, 205:]).all()
    assert (control[:, 5:200] == control[:, 205:]).mean() < 0.05
    for head in range(memory.shape[-1]):  # within the rows of the same heads
        assert memory[..., head].min() // 60 == control[..., head].min() // 60


def test_shuffled_keys_are_the_neighbours_ngrams():
    np.testing.assert_array_equal(ids("shuffled"), np.roll(ids("ngrams"), 1, axis=0))
    with pytest.raises(AssertionError, match="no neighbours"):
        of_neighbours(jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize("keys", ["shuffled", "random"])
def test_controls_do_not_serve(keys):
    control = model(keys)
    addressing = address(control, CompressedVocabulary.identity(VOCAB), 2)
    for make in (HostHash, lambda a: serving.DeviceRows(control, a, {})):
        with pytest.raises(UserError, match=rf"layer_0.keys = '{keys}': is a control"):
            make(addressing)


def test_a_device_with_one_sequence_has_no_neighbour():
    run = changed(micro("none"), {"model": model("shuffled")})
    single = changed(run, {"data.batch_size": 1})
    with pytest.raises(UserError, match=r"data.batch_size = 1: .*shuffled.*two for a device"):
        placement.check(single, placement.single_mesh())
    placement.check(run, placement.single_mesh())


def test_unknown_keys():
    with pytest.raises(UserError, match=r"EngramConfig.keys = 'nope': must be one of ngrams, "):
        model("nope")
