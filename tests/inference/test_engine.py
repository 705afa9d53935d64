"""The engine: the text of plain recomputation, whatever the home, the chunks and the neighbours."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest
import serving
from serving import CHUNK, FIRST, ISOLATED, LENGTH, MODEL, PLAIN, SLOTS, VOCAB

from engram_jax.config import OverEncodingConfig
from engram_jax.errors import MachineError, UserError
from engram_jax.inference import stages
from engram_jax.inference.engine import Request
from engram_jax.offload.host import HostTable
from engram_jax.settings import changed

pytestmark = pytest.mark.usefixtures("compilations")
PROMPTS = [serving.prompt(length) for length in (5, 9, 1, 13, 4)]
TOKENS = 6


@pytest.fixture(name="opened")
def closes_what_it_opens():
    with contextlib.ExitStack() as stack:
        def opened(rows):
            return stack.enter_context(contextlib.closing(rows))

        yield opened


@pytest.fixture(name="rows_of")
def rows_of_each_home(opened, tmp_path):
    def rows_of(home, model):
        if home == "device":
            return serving.device_rows(model)
        homes = (serving.host_tables(model) if home == "host"
                 else serving.disk_tables(model, tmp_path))
        return opened(serving.host_rows(model, homes))

    return rows_of


def recomputed(model, requests, end_id=serving.END):
    return [serving.recomputed(model, request.prompt, request.tokens, end_id)
            for request in requests]


# --- Plain recomputation ---


@pytest.mark.parametrize("chunk", [
    1, CHUNK, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (3, LENGTH))])
@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_the_text_is_that_of_plain_recomputation(home, chunk, rows_of):
    requests = serving.greedy(PROMPTS, TOKENS)
    assert serving.generated(MODEL, rows_of(home, MODEL), requests, chunk=chunk) == recomputed(
        MODEL, requests)


@pytest.mark.parametrize("home", ["device", "host"])
def test_documents_stay_apart(home, rows_of):
    """In the prompt, across chunks, and at the very end of the prompt."""
    apart = (*serving.prompt(3), serving.END)
    prompts = [apart + serving.prompt(6), (*serving.prompt(6), serving.END), apart + apart]
    requests = serving.greedy(prompts, TOKENS)
    expected = recomputed(ISOLATED, requests)
    assert serving.generated(ISOLATED, rows_of(home, ISOLATED), requests) == expected
    assert expected[0] == serving.recomputed(ISOLATED, serving.prompt(6), TOKENS)


@pytest.mark.parametrize("home", ["device", "host"])
def test_off_and_on_overlap_are_the_same_text(home, rows_of):
    requests = serving.greedy(PROMPTS, TOKENS)
    assert serving.generated(
        MODEL, rows_of(home, MODEL), requests, overlap=False) == recomputed(MODEL, requests)


def test_a_prompt_may_fill_the_slot_but_for_what_it_generates(rows_of):
    requests = serving.greedy([serving.prompt(LENGTH - 1), serving.prompt(LENGTH - 2)], 1)
    assert serving.generated(
        MODEL, rows_of("device", MODEL), requests) == recomputed(MODEL, requests)


# --- Neighbours ---


def drawn(prompt, tokens=TOKENS, **settings):
    return Request(prompt=prompt, tokens=tokens, **{"temperature": 1.0, "seed": 3, **settings})


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_neighbours(rows_of):
    rows = rows_of("host", MODEL)
    requests = [drawn(ids, seed=seed, top_k=top_k, top_p=top_p) for ids, seed, top_k, top_p in zip(
        PROMPTS, (1, 2, 3, 2**32 - 1, 5), (0, 5, 0, 50, 0), (1.0, 1.0, 0.9, 0.8, 0.5), strict=True)]
    alone = [serving.generated(MODEL, rows, [request], slots=SLOTS)[0] for request in requests]
    assert serving.generated(MODEL, rows, requests) == alone
    assert serving.generated(MODEL, rows, requests[::-1]) == alone[::-1]
    other = dataclasses.replace(requests[0], seed=7)
    assert serving.generated(MODEL, rows, [other])[0] != alone[0]


@pytest.mark.parametrize("home", ["device", "host"])
def test_who_joins_late_changes_nothing(home, rows_of):
    mixed = [*serving.greedy(PROMPTS[:2], 10), drawn(PROMPTS[2], 8)]
    late = [drawn(PROMPTS[3], 4), *serving.greedy(PROMPTS[4:], 3)]
    rows = rows_of(home, MODEL)
    expected = [serving.generated(MODEL, rows, [request])[0] for request in mixed + late]
    engine = serving.engine(MODEL, rows)
    for request in mixed:
        engine.submit(request)
    found = {number: [] for number in range(5)}
    steps = 0
    while engine.busy:
        if steps in (3, 5):
            engine.submit(late[(steps - 3) // 2])
        for event in engine.step():
            found[event.number].append(event.token)
            assert event.done == (len(found[event.number]) == (mixed + late)[event.number].tokens)
        steps += 1
    assert list(found.values()) == expected


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("home", ["device", "host"])
def test_the_end_token_frees_the_slot_and_nothing_leaks(home, overlap, rows_of):
    """The next sequence of a slot is read in one chunk, or in many."""
    ends = serving.recomputed(MODEL, PROMPTS[0], 8)[3]
    requests = serving.greedy([PROMPTS[0], PROMPTS[3], PROMPTS[0], PROMPTS[2], PROMPTS[1]], 8)
    expected = recomputed(MODEL, requests, ends)
    assert expected[0][-1] == ends
    assert len(expected[0]) <= 4
    engine = serving.engine(MODEL, rows_of(home, MODEL), end_id=ends, overlap=overlap)
    assert engine.generate(requests[:2]) == expected[:2]
    assert engine.generate(requests) == expected


def a_schedule(seed):
    """Requests, the step before which each is submitted, and a token that ends some of them."""
    random = np.random.default_rng(seed)
    requests = []
    for number in range(random.integers(1, 8)):
        ids = np.array(serving.prompt(random.integers(1, 20), seed=[seed, number]))
        ids[random.random(ids.size) < 0.1] = serving.END
        requests.append(drawn(
            tuple(ids.tolist()), int(random.integers(1, 12)), seed=number,
            temperature=float(random.choice([0, 0.7])), top_k=int(random.choice([0, 3]))))
    steps = np.sort(random.integers(0, 20, len(requests)))
    return requests, steps.tolist(), int(random.integers(0, 8))


def follow(engine, requests, steps):
    """The tokens of requests that come one after the other."""
    found, step = [[] for _ in requests], 0
    waiting = list(zip(steps, requests, strict=True))
    while waiting or engine.busy:
        while waiting and waiting[0][0] <= step:
            engine.submit(waiting.pop(0)[1])
        for event in engine.step():
            found[event.number].append(event.token)
        step += 1
    return found


@pytest.mark.parametrize("model", [MODEL, ISOLATED], ids=["together", "isolated"])
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 300), marks=pytest.mark.slow)])
def test_whoever_comes_when(seeds, model, rows_of):
    """Each sequence is the one that it is alone, from the other home."""
    on_device, on_host = rows_of("device", model), rows_of("host", model)
    for seed in seeds:
        requests, steps, late = a_schedule(seed)
        whole = [serving.generated(model, on_device, [request], end_id=serving.END)[0]
                 for request in requests]
        ends = whole[0][min(late, len(whole[0]) - 1)] if model is MODEL else serving.END
        alone = [serving.generated(model, on_device, [request], end_id=ends)[0]
                 for request in requests]
        for rows, overlap in ((on_host, True), (on_device, True), (on_host, False)):
            engine = serving.engine(model, rows, end_id=ends, overlap=overlap)
            assert follow(engine, requests, steps) == alone


def test_tokens_that_the_tokenizer_does_not_know_are_never_generated(rows_of):
    prompts = [tuple(token % 150 for token in ids) for ids in PROMPTS]
    requests = [*serving.greedy(prompts[:2], TOKENS), drawn(prompts[2], temperature=9.0)]
    for known in (VOCAB, 150):
        texts = serving.generated(MODEL, rows_of("device", MODEL), requests, known=known)
        assert all((max(text) < 150) == (known == 150) for text in texts)


# --- Rows that come late, or not at all ---


class Waits:
    """A home that gives nothing before `let` is set."""

    fingerprint = ""

    def __init__(self, home, let):
        self.format, self.rows, self.group = home.format, home.rows, home.group
        self._home, self._let = home, let

    def lookup(self, ids_U, out=None):
        assert self._let.wait(20), "nobody let it"
        return self._home.lookup(ids_U, out)

    def fill(self, ids_GK):
        self._home.fill(ids_GK)

    def tiers(self):
        return self._home.tiers()

    def close(self):
        self._let.set()


class Noted(dict):
    """Rows of a request that note when they are taken."""

    def __init__(self, rows, notes):
        self._rows, self._notes = rows, notes

    def __getitem__(self, site):
        self._notes.append("take")
        return self._rows[site]


def test_what_needs_no_rows_is_dispatched_before_they_are_there(opened, monkeypatch):
    """Rows are asked for first, even before the tokens have left the device, and taken last."""
    let = threading.Event()
    homes = {name: Waits(home, let) for name, home in serving.host_tables(MODEL).items()}
    rows = opened(serving.host_rows(MODEL, homes))
    begin, request, seen, notes = stages.begin, rows.request, [], []

    def asks(tokens, history, count):
        notes.append("ask")
        assert isinstance(tokens, jax.Array) == (len(tokens) == SLOTS)
        return Noted(request(tokens, history, count=count), notes)

    def begins(*args, **kwargs):
        notes.append("begin")
        seen.append(let.is_set())
        out = begin(*args, **kwargs)
        let.set()
        return out

    def finishes(*args, finish=stages.finish, **kwargs):
        let.clear()
        return finish(*args, **kwargs)

    monkeypatch.setattr(stages, "begin", begins)
    monkeypatch.setattr(stages, "finish", finishes)
    monkeypatch.setattr(rows, "request", asks)
    requests = serving.greedy(PROMPTS[:1], 4)
    engine = serving.engine(MODEL, rows)
    engine.submit(requests[0])
    text = []
    while engine.busy:
        let.clear()
        text += [event.token for event in engine.step()]
    assert [text] == recomputed(MODEL, requests)
    assert not any(seen)
    read = ["begin", "take", "take"]
    assert notes == ["ask", *read, "ask", *read] + ["ask", *read] * 3


class Fails(HostTable):
    def fail(self, error, after):
        self.error, self.left = error, after
        return self

    def lookup(self, ids_U, out=None):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().lookup(ids_U, out)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", [
    MachineError("layer_2.fp8.table: ended while it was read"), ZeroDivisionError("a bug"),
    SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_rows_that_do_not_come_raise_what_went_wrong(after, error, overlap, opened):
    """In the first chunk, in a later one, and while decoding; never a token from zeros."""
    homes = serving.host_tables(MODEL)
    table = homes["layer_2"]
    homes["layer_2"] = Fails(table.format, table.packed_RB).fail(error, after)
    engine = serving.engine(MODEL, opened(serving.host_rows(MODEL, homes)), overlap=overlap)
    expected = serving.recomputed(MODEL, PROMPTS[1], TOKENS)
    engine.submit(Request(prompt=PROMPTS[1], tokens=TOKENS))
    text, raised = [], []

    def steps():
        try:
            while engine.busy:
                text.extend(event.token for event in engine.step())
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=steps, daemon=True)
    worker.start()
    worker.join(30)
    assert not worker.is_alive(), "it hangs"
    assert raised == [error]
    assert text == expected[:len(text)]
    assert len(text) == max(0, after - 3)
    homes["layer_2"].left = 999
    assert not engine.busy
    requests = serving.greedy(PROMPTS, TOKENS)
    assert engine.generate(requests) == recomputed(MODEL, requests)


# --- Memories of other kinds ---


@pytest.mark.parametrize("base", [PLAIN, pytest.param(MODEL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("home", ["device", "host"])
def test_over_encoding(home, base, rows_of):
    over = OverEncodingConfig(rows_per_head=(64, 128), heads=2, shards=4)
    model = dataclasses.replace(base, over_encoding=over)
    requests = serving.greedy(PROMPTS, TOKENS)
    assert serving.generated(model, rows_of(home, model), requests) == recomputed(model, requests)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("home", ["device", "host"])
def test_without_any_memory(home, overlap, rows_of):
    requests = serving.greedy(PROMPTS, TOKENS)
    assert serving.generated(
        PLAIN, rows_of(home, PLAIN), requests, overlap=overlap) == recomputed(PLAIN, requests)


@pytest.mark.parametrize("home", ["device", "host"])
def test_without_convolution_or_head_of_its_own_and_with_memory_first(home, rows_of):
    model = changed(FIRST, {"tied_head": True, "engram.kernel": 0})
    requests = serving.greedy(PROMPTS, TOKENS)
    assert serving.generated(model, rows_of(home, model), requests) == recomputed(model, requests)


def test_in_bfloat16_every_home_gives_the_same_text(rows_of):
    model = dataclasses.replace(FIRST, compute_dtype="bfloat16")
    requests = [*serving.greedy(PROMPTS[:2], TOKENS), drawn(PROMPTS[2])]
    on_device = serving.generated(model, rows_of("device", model), requests)
    assert serving.generated(model, rows_of("host", model), requests) == on_device


# --- What is refused ---


@pytest.mark.parametrize(("fields", "line"), [
    ({"prompt": ()}, r"prompt = \(\): must have at least one token"),
    ({"tokens": 0}, "tokens = 0: must be at least 1"),
    ({"temperature": -1.0}, "temperature = -1.0: "),
    ({"temperature": float("nan")}, "temperature = nan: "),
    ({"temperature": float("inf")}, "temperature = inf: "),
    ({"top_k": -1}, "top_k = -1: "),
    ({"top_k": 2**31}, "top_k = 2147483648: "),
    ({"top_p": 0.0}, "top_p = 0.0: "),
    ({"top_p": 1.1}, "top_p = 1.1: "),
    ({"top_p": float("nan")}, "top_p = nan: "),
    ({"seed": -1}, "seed = -1: "),
    ({"seed": 2**32}, "seed = 4294967296: ")])
def test_a_bad_request_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        Request(**{"prompt": (1,), "tokens": 1, **fields})


def test_what_does_not_fit_is_refused_and_does_no_harm():
    engine = serving.engine(MODEL, serving.device_rows(MODEL), known=290)
    good = Request(prompt=PROMPTS[0], tokens=3)
    for prompt, tokens, line in [
        (serving.prompt(LENGTH), 1, "prompt = '32 tokens': with 1 more to generate needs 33 pos"),
        (serving.prompt(4), LENGTH, "needs 36 positions, and a sequence has 32"),
        ((1, 290), 1, "prompt = 290: is no token: ids are in 0..289"),
        ((1, VOCAB), 1, "prompt = 300: is no token"),
        ((-1, 1), 1, "prompt = -1: is no token"),
    ]:
        with pytest.raises(UserError, match=line):
            engine.submit(Request(prompt=prompt, tokens=tokens))
        with pytest.raises(UserError, match=line):
            engine.generate([good, Request(prompt=prompt, tokens=tokens)])
    assert not engine.busy
    engine.submit(good)
    with pytest.raises(UserError, match="others are on their way"):
        engine.generate([good])
    while engine.busy:
        engine.step()
    assert engine.generate([good]) == [serving.recomputed(MODEL, PROMPTS[0], 3)]


@pytest.mark.parametrize("name", ["slots", "length", "chunk"])
def test_an_engine_without_room_is_refused(name):
    with pytest.raises(UserError, match=f"{name} = 0: must be at least 1"):
        serving.engine(MODEL, serving.device_rows(MODEL), **{name: 0})


# --- Counters ---


def test_counters(rows_of):
    """Each row of a chunk is read once for each site, and put onto the device once."""
    repeats = (9, 9, 9, 9) * 2
    rows = rows_of("host", MODEL)
    serving.generated(MODEL, rows, serving.greedy([repeats], 1))
    heads = MODEL.engram.total_heads
    hashed = rows._hash(np.array([repeats[:CHUNK]]))
    first = sum(np.unique(ids).size for ids in hashed.values())
    found = rows.counters
    assert found.tokens == 8
    assert found.asked == 8 * 2 * heads
    assert found.read == first + 2 * heads
    packed = 16 * MODEL.engram.head_dim * 4
    assert found.bytes == 2 * 2 * (packed + CHUNK * heads * 4)
    assert found.fetch_s > 0
    assert 0 <= found.hidden_share <= 1
