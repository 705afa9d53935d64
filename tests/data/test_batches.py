"""Token streams to batches: their order, and where it goes on."""

import json

import numpy as np
import pytest
from texts import assert_same, changed, read_all, take

from engram_jax.data import tokens
from engram_jax.data.batches import train_batches, validation_batches
from engram_jax.errors import UserError


def windows_of(batches):
    """Each sequence's T + 1 tokens as a tuple."""
    return [(*row, target[-1]) for batch in batches
            for row, target in zip(batch["tokens_BT"].tolist(), batch["targets_BT"].tolist(),
                                   strict=True)]


def test_an_epoch_predicts_each_token_once(settings):
    data = tokens.open_tokens(settings)
    ids, length = read_all(data.train), settings.sequence_length
    count = (len(ids) - 1) // length
    batches = take(train_batches(data, settings), -(-2 * count // settings.batch_size))
    seen = windows_of(batches)
    wanted = sorted(tuple(ids[i * length:(i + 1) * length + 1].tolist()) for i in range(count))
    assert sorted(seen[:count]) == wanted
    assert sorted(seen[count:2 * count]) == wanted
    assert seen[:count] != seen[count:2 * count]  # in a new order
    assert seen[:count] != wanted


def test_targets_follow_and_starts_follow_end_tokens(settings):
    data = tokens.open_tokens(settings)
    ids = read_all(data.train)
    starts = np.concatenate([[True], ids[:-1] == data.end_id])
    length = settings.sequence_length
    known = {tuple(ids[i:i + length + 1].tolist()): starts[i:i + length]
             for i in range(0, len(ids) - length, length)}
    count = (len(ids) - 1) // length // settings.batch_size
    firsts = 0
    for batch in take(train_batches(data, settings), count):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "tokens_BT": ((4, 16), np.int32), "targets_BT": ((4, 16), np.int32),
            "starts_BT": ((4, 16), np.bool_)}
        np.testing.assert_array_equal(batch["tokens_BT"][:, 1:], batch["targets_BT"][:, :-1])
        for window, starts_T in zip(windows_of([batch]), batch["starts_BT"], strict=True):
            np.testing.assert_array_equal(starts_T, known[window])
            firsts += int(starts_T[0])
    assert firsts > 1  # a start at the edge of a window is seen across it


def test_the_seed_alone_makes_the_order(settings):
    data = tokens.open_tokens(settings)
    per_epoch = (data.train_tokens - 1) // settings.sequence_length
    count = 2 * per_epoch // settings.batch_size + 1
    first = take(train_batches(data, settings), count)
    assert_same(first, take(train_batches(data, settings), count))
    for seed in (1, 2):
        other = windows_of(take(train_batches(data, changed(settings, seed=seed)), count))
        assert other[:per_epoch] != windows_of(first)[:per_epoch]
        # nor is it the next epoch of another seed
        assert other[:per_epoch] != windows_of(first)[per_epoch:2 * per_epoch]


@pytest.mark.parametrize("done", [0, 3, 70])
def test_an_iterator_continues_where_it_was(settings, done):
    data = tokens.open_tokens(settings)
    per_epoch = (data.train_tokens - 1) // settings.sequence_length // settings.batch_size
    assert 3 < per_epoch < 70  # in the first epoch, and after an epoch's end
    iterator = train_batches(data, settings)
    take(iterator, done)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = take(iterator, per_epoch + 2)
    fresh = train_batches(data, settings)
    fresh.set_state(state)
    assert_same(take(fresh, per_epoch + 2), wanted)
    take(iterator, 2)
    iterator.set_state(state)
    assert_same(take(iterator, 2), wanted[:2])


def test_orbax_saves_and_loads_the_iterator(settings, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint.experimental.v1")
    data = tokens.open_tokens(settings)
    iterator = train_batches(data, settings)
    take(iterator, 5)
    response = ocp.save_checkpointables_async(tmp_path / "checkpoint", {"data": iterator})
    wanted = take(iterator, 4)  # while it is being saved
    response.result()
    fresh = train_batches(data, settings)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": fresh})
    assert_same(take(fresh, 4), wanted)


def test_processes_share_the_same_batches(settings):
    data = tokens.open_tokens(settings)
    whole = take(train_batches(data, settings), 60)
    for count in (2, 4):
        parts = [take(train_batches(data, settings, process_index=index, process_count=count), 60)
                 for index in range(count)]
        assert_same([{name: np.concatenate([part[name] for part in step]) for name in step[0]}
                     for step in zip(*parts, strict=True)], whole)
    whole = list(validation_batches(data, settings))
    parts = [list(validation_batches(data, settings, process_index=index, process_count=2))
             for index in range(2)]
    assert_same([{name: np.concatenate([part[name] for part in step]) for name in step[0]}
                 for step in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_validation_predicts_each_token_once_in_order(settings, length, batch_size):
    config = changed(settings, sequence_length=length, batch_size=batch_size)
    data = tokens.open_tokens(config)
    ids = read_all(data.validation)
    batches = list(validation_batches(data, config))
    assert all(batch["tokens_BT"].shape == (batch_size, length) for batch in batches)
    joined = {name: np.concatenate([batch[name].ravel() for batch in batches])
              for name in batches[0]}
    real = joined["weights_BT"] == 1
    assert joined["weights_BT"].dtype == np.float32
    assert set(joined["weights_BT"]) <= {0, 1}
    np.testing.assert_array_equal(joined["targets_BT"][real], ids[1:])
    np.testing.assert_array_equal(joined["tokens_BT"][real], ids[:-1])
    np.testing.assert_array_equal(joined["starts_BT"][real],
                                  np.concatenate([[True], ids[:-2] == data.end_id]))
    assert (joined["targets_BT"][~real] == data.pad_id).all()
    for batch in batches:
        unused = batch["weights_BT"].sum(axis=1) == 0
        assert (batch["tokens_BT"][unused] == data.pad_id).all()
        assert not batch["starts_BT"][unused].any()
    assert_same(batches, list(validation_batches(data, changed(config, seed=9))))
    assert_same(batches[:2], list(validation_batches(data, config, limit=2)))


@pytest.mark.parametrize(("values", "count", "message"), [
    ({"sequence_length": 10_000}, 1,
     r"^data\.sequence_length = 10000: is too long for \d{4} tokens of training text"),
    ({"batch_size": 1000}, 1, r"^data\.batch_size = 1000: is more than the \d+ sequences of "
                              r"data\.sequence_length = 16 in \d{4} tokens"),
    ({"batch_size": 3}, 2, r"^data\.batch_size = 3: does not divide among 2 processes"),
])
def test_batches_that_cannot_be(settings, values, count, message):
    config = changed(settings, **values)
    data = tokens.open_tokens(config)
    with pytest.raises(UserError, match=message):
        train_batches(data, config, process_count=count)


def test_a_text_too_small_to_validate_on(tmp_path, settings):
    (tmp_path / "a.txt").write_text("x")
    config = changed(settings, path=str(tmp_path / "a.txt"))
    data = tokens.open_tokens(config)
    with pytest.raises(UserError, match=r"^data\.sequence_length = 16: is too long for 1 token"):
        train_batches(data, config)
    with pytest.raises(UserError, match=r"^data\.validation_fraction = 0\.1: leaves 0 tokens of 1"):
        validation_batches(data, config)
