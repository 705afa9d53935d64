"""`report`: one page of HTML that holds every section, asks for nothing and survives any text."""

import dataclasses
import html.parser
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from micro import STEPS, micro, plain, with_data, with_model, with_optimizer, with_training

from engram_jax.cli import main
from engram_jax.report import findings, looks, memories, outcomes
from engram_jax.report.memories import thinned
from engram_jax.report.page import SECTIONS, headline
from engram_jax.results.scores import Score, keep_scores
from engram_jax.runs.train import train
from engram_jax.settings import to_dict

pytestmark = pytest.mark.usefixtures("compilations")
EVIL = '</script><script>alert("x")</script><b>&amp;</b>'
SLOWER = "</script><script>slower & <i>slower"  # a run may be called so
TEXT = f"Kalo Misu met Tera Vipe in Nolo Peka.\n{EVIL}\n记忆 of Radu Sulo, Vimi Kate\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs on a text full of tags: with memory, without, and what stands in for another
    arm and another seed of the first."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(TEXT * 150)
    memory = plain(micro(str(folder / "text.txt"), name="memory"))
    bare = dataclasses.replace(with_model(memory, engram=None), name="bare")
    for run in (memory, bare):
        train(run, folder / "runs" / run.name, lambda line: None)
    seed1 = dataclasses.replace(memory, name="memory-seed1")
    slower = with_optimizer(dataclasses.replace(memory, name=SLOWER), learning_rate=1e-3)
    for place, run in (("slower", slower),
                       ("memory-seed1", with_data(with_training(seed1, seed=1), seed=1))):
        shutil.copytree(folder / "runs" / "memory", folder / "runs" / place)
        (folder / "runs" / place / "config.json").write_text(json.dumps(to_dict(run)))
    return folder / "runs"


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The page of all of them, one run without its result, and one that has just begun."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(runs, folder / "runs")
    (folder / "runs" / "memory-seed1" / "result.json").unlink()
    (folder / "runs" / "begun").mkdir()
    begun = with_optimizer(findings.RunDirectory(runs / "memory").config(), learning_rate=1e-5)
    (folder / "runs" / "begun" / "config.json").write_text(
        json.dumps(to_dict(dataclasses.replace(begun, name="begun"))))
    for name in ("tokenizer.json", "env.json"):
        shutil.copy(runs / "memory" / name, folder / "runs" / "begun" / name)
    for name, value in (("memory", 87.5), ("bare", 12.5)):
        keep_scores(findings.RunDirectory(folder / "runs" / name), [
            Score(of="ruler", task=EVIL, metric="", step=step, value=value - step,
                  settings={"length": 2048}) for step in (6, 7)])
    assert main.main(["report", str(folder / "runs"), "--out", str(folder / "page.html")]) == 0
    assert sorted(os.listdir(folder)) == ["page.html", "runs"]
    return folder / "page.html"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: scripts, what is visible, and what it would ask for."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.asked, self.ids = [], [], [], []
        self.said, self.style, self._in = "", "", ""
        self.feed(Path(path).read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self._in = tag
        self.ids += [found["id"]] if "id" in found else []
        self.asked += [found[name] for name in ("src", "href", "srcset", "data", "action")
                       if name in found]
        if tag == "script":
            self.scripts.append((found.get("type", ""), ""))

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = kind, before + data
        elif self._in == "style":
            self.style += data
        else:
            self.said += data


@pytest.fixture(scope="module")
def read(page):
    return Page(page)


def test_the_page_holds_every_section(read):
    names = ["runs", "scores", "curves", "costs", "gates", "lens", "cka", "suppression",
             "patchscope", "tokenizer", "memory", "records"]
    assert len(names) == len(SECTIONS) + 1
    assert [name for name in read.ids if name != "swap"] == names
    for words in ("nats a token: the loss of", "engram-jax report", '"rows_per_head"',
                  "bare: has no Engram", "bare: has no memory", "begun: has no checkpoint yet",
                  "Both runs began with the same", f"{EVIL} at 2,048", "80.5", "5.5",
                  f"memory-seed1 is not done: step {STEPS} of {STEPS}"):
        assert words in read.said, words
    for name in ("memory", SLOWER, "bare"):
        assert name in read.said


def test_the_page_asks_for_nothing(read, page):
    assert read.asked
    assert all(link.startswith("#") for link in read.asked)
    assert {link[1:] for link in read.asked} <= set(read.ids)
    assert "url(" not in read.style
    assert "@import" not in read.style
    assert not {"link", "img", "iframe", "object"} & set(read.tags)
    assert "default-src 'none'" in page.read_text()


def test_every_figure_is_json_with_something_in_it(read):
    data = [json.loads(text) for kind, text in read.scripts if kind == "application/json"]
    figures = [value for value in data if "layout" in value]
    assert len(figures) == read.tags.count("figure") > 15
    assert all(value["data"] for value in figures)
    gates = next(value for value in data if set(value) == {"memory", SLOWER})
    assert set(gates["memory"]) == {"0"}


def test_a_text_cannot_break_the_page(read, page):
    programs = [text for kind, text in read.scripts if not kind]
    assert len(programs) == 2, "plotly's and the page's"
    assert "i" not in read.tags
    assert page.read_text().count("</script>") == len(read.scripts)
    assert EVIL in read.said.replace("\N{RETURN SYMBOL}", ""), "its tokens are shown as they are"


def test_a_run_without_memory_says_what_it_has_not(runs, tmp_path):
    out = tmp_path / "bare.html"
    assert main.main(["report", str(runs / "bare"), "--out", str(out), "--text",
                     str(runs.parent / "text.txt")]) == 0
    read = Page(out)
    assert "bare: has no Engram, so there is nothing of it to look at" in read.said
    assert read.said.count("bare: has no memory") == 2
    assert "bits a byte" in read.said
    assert "scores" not in read.ids, "it has none"


def test_what_cannot_be_reported(runs, tmp_path, capsys):
    empty, half = tmp_path / "empty", tmp_path / "half"
    empty.mkdir()
    half.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(runs / "memory" / name, half / name)
    out, nothing = tmp_path / "page.html", tmp_path / "nothing.txt"
    nothing.touch()
    for words, said in (
        ((empty,), "holds no run"),
        ((half,), "checkpoint"),
        ((runs / "bare", "--text", tmp_path / "none.txt"), "must be a text file"),
        ((runs / "bare", "--text", nothing), "is empty"),
        ((runs / "bare", "--out", empty), "is a folder; name a file"),
        ((runs / "bare", "--out", tmp_path / "nowhere" / "page.html"), "its folder is not there"),
    ):
        assert main.main(["report", *map(str, words if "--out" in words else
                                        (*words, "--out", out))]) == 2
        line = capsys.readouterr().err.strip()
        assert said in line
        assert "\n" not in line
    assert sorted(os.listdir(tmp_path)) == ["empty", "half", "nothing.txt"]


def test_a_text_that_is_gone_leaves_the_records(runs, tmp_path):
    place = tmp_path / "moved"
    shutil.copytree(runs / "memory", place)
    config = json.loads((place / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone.txt")
    (place / "config.json").write_text(json.dumps(config))
    out = tmp_path / "page.html"
    assert main.main(["report", str(place), "--out", str(out)]) == 0
    read = Page(out)
    assert "its text cannot be read" in read.said
    assert "Training loss" in read.said


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Records, and nothing else, of four sizes of memory and of none, two seeds each."""
    folder = tmp_path_factory.mktemp("sizes")
    base = plain(micro("text.txt"))
    for place, rows in enumerate((1024, 64, 4096, 256, 0)):
        engram = dataclasses.replace(base.model.engram, rows_per_head=(rows or 2,) * 2)
        sized = with_model(base, engram=engram if rows else None)
        for seed in (0, 1):
            run = dataclasses.replace(sized, name=f"a{place}-seed{seed}")
            run = with_data(with_training(run, seed=seed), seed=seed)
            (folder / run.name).mkdir()
            (folder / run.name / "config.json").write_text(json.dumps(to_dict(run)))
            (folder / run.name / "result.json").write_text(json.dumps(
                {"loss": 4 + 0.1 * place + 0.01 * seed, "bits_per_byte": 2, "tokens_per_s": 10}))
    return folder


def test_arms_are_in_the_order_of_their_memories_and_told_apart(sizes, monkeypatch):
    monkeypatch.setattr(findings, "open_run", lambda records, mesh: None)
    monkeypatch.setattr(findings, "validation_text", lambda opened: "")
    found = findings.material([sizes])
    assert [subject.name for subject in found.subjects] == ["a4", "a1", "a3", "a0", "a2"]
    named = findings.material([sizes / "a0-seed0", sizes])
    assert named.subjects[0].name == "a0", "who names a run first makes it the measure"
    drawn = [subject.look for subject in found.subjects]
    assert len({look.light for look in drawn}) == len({look.dark for look in drawn}) == 5
    swap = looks.swap(drawn)
    assert not set(swap) & set(swap.values()), "no colour is put in twice"
    table, losses, by_slots = outcomes.outcomes(found).blocks
    assert [cell.text for cell in table.rows[1][:3]] == [
        "a1", "4.1050", "\N{MINUS SIGN}0.3000"]
    assert len(losses.figure["data"]) == 10, "the seeds and the mean of each arm"
    engram, bare = by_slots.figure["data"]
    assert engram["x"] == [64, 256, 1024, 4096]
    assert engram["y"] == pytest.approx([4.105, 4.305, 4.005, 4.205])
    assert bare["y"] == pytest.approx([4.405] * 2)
    assert headline(found)[0] == "\N{MINUS SIGN}0.400"


def arm(name, losses, **fields):
    """A subject with one run of seed 0, and its curves."""
    fields = {**dict.fromkeys(outcomes.BATCHES, "alike"), **fields}
    subject = SimpleNamespace(name=name, look=looks.Look("#000000", "#ffffff"),
                              arm=SimpleNamespace(fields=fields))
    return subject, [(SimpleNamespace(seed=(0, 0)), {"learning/loss": list(enumerate(losses))})]


def test_losses_are_set_off_where_batches_are_the_same():
    found = outcomes._gaps([arm("a", [3, 2]), arm("b", [2, 2]), arm("c", [1, 1], text="other"),
                            arm("d", [1, 1], **{"data.batch_size": 3})])
    assert [(line.meta, list(line.y)) for line in found] == [("b", [-1, 0])]


def test_a_line_through_sizes_is_of_arms_that_differ_in_nothing_else():
    rows, rate = "model.engram.rows_per_head", "optimizer.learning_rate"
    sizes = [arm("a", [], **{rows: [2], rate: 1})[0], arm("b", [], **{rows: [3], rate: 1})[0]]
    assert outcomes._only_slots(sizes)
    assert not outcomes._only_slots([*sizes, arm("c", [], **{rows: [4], rate: 2})[0]])


def test_bands_keep_their_names_and_order_whichever_were_found():
    reads = memories.memory_use.READS
    assert memories._named({0: 0.1, 100: 0.2}, reads) == ["0", "100\N{EN DASH}999"]
    assert memories._bands_axis("reads", reads)["categoryarray"] == looks.ranges(reads)


def test_words_of_plots():
    assert looks.ranges([0, 1, 2, 5, 1000]) == ["0", "1", "2\N{EN DASH}4", "5\N{EN DASH}999",
                                                "1,000+"]
    assert looks.visible("a b   \n\t") == (
        "a\N{OPEN BOX}b\N{OPEN BOX}\N{MULTIPLICATION SIGN}3\N{RETURN SYMBOL}"
        "\N{RIGHTWARDS ARROW TO BAR}")
    assert looks.signed(-0.5, 1) == "\N{MINUS SIGN}0.5"
    assert looks.shortened("<b>") == "&lt;b&gt;"
    assert len(looks.shortened("x" * 99)) == 25
    assert thinned(5) == [0, 1, 2, 3, 4]
    ranks = thinned(30_000)
    assert ranks[0] == 0
    assert ranks[-1] == 29_999
    assert len(ranks) <= 200


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if not browser():
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        # Chromium's own sandbox does not start for root.
        opened = started.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it(page, chromium, width, scheme, tmp_path):
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    figures = tab.locator("figure.plot").count()
    assert tab.locator("figure.plot .canvas .main-svg").count() >= figures > 15
    assert tab.locator("figure.plot .canvas").evaluate_all(
        "canvases => canvases.every(c => c.querySelector('.cartesianlayer .subplot'))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink = tab.locator(".canvas .xtick text").first.evaluate("tick => getComputedStyle(tick).fill")
    assert max(map(int, ink[4:-1].split(","))) > 150 if scheme == "dark" else "rgb(90, " in ink
    pressed(tab)
    chosen(tab)
    folder = Path(os.environ.get("ENGRAM_SCREENSHOTS", tmp_path))
    tab.screenshot(path=folder / f"report-{width}-{scheme}.png", full_page=True)
    assert said == []
    assert asked == [page.as_uri()]
    tab.close()


def pressed(tab):
    """A name's button hides its lines in the whole section, and shows them again."""
    lines = tab.locator("#curves .scatterlayer .trace")
    button, before = tab.locator("#curves > .keys button").first, lines.count()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() < before
    button.click()
    assert lines.count() == before


def chosen(tab):
    """The keyboard chooses another text, whose tokens are shaded; one that is pressed is told."""
    tokens, text = tab.locator(".tokens:not([hidden]) span"), tab.locator("select[name=text]").first
    before = tokens.all_inner_texts()
    text.focus()
    tab.keyboard.press("ArrowDown")
    assert tokens.all_inner_texts() != before
    shades = tokens.evaluate_all(
        "spans => spans.map(span => span.style.getPropertyValue('--gate'))")
    assert {"0.000", "1.000"} <= set(shades)
    tokens.first.click()
    assert tokens.first.inner_text() in tab.locator("output[name=said]").first.inner_text()
