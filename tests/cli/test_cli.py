"""The command line: every command does its work, and every mistake is one line and an exit code."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
from micro import STEPS, micro, plain, write_text

import engram_jax
from engram_jax import recipes, settled
from engram_jax.cli import evaluation, main, results, runs, serving
from engram_jax.cli.words import keeping_programs
from engram_jax.runs.directory import RunDirectory
from engram_jax.settings import changed, with_settings
from engram_jax.sweeps import sweep

pytestmark = pytest.mark.usefixtures("compilations")
COMMANDS = tuple(main.parser()._subparsers._group_actions[0].choices)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module", autouse=True)
def recipe(text):
    """A recipe "micro" beside the others, on the standard library until it is told otherwise."""
    run = changed(plain(micro(text)), {"data.path": "stdlib"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "micro", lambda: run)
        yield run


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained") / "run"
    assert main.main(["train", "micro", "--out", str(place), "--set", f"data.path={text}"]) == 0
    return place


def succeeded(capsys, *words):
    """What the command printed."""
    capsys.readouterr()
    assert main.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words, code=2):
    """The one line that the command left on standard error."""
    capsys.readouterr()
    try:
        found = main.main([str(word) for word in words])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    error = capsys.readouterr().err
    assert found == code, error
    assert error.endswith("\n")
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    return error


def in_a_process(*words):
    package = pathlib.Path(engram_jax.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "engram_jax.cli", *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(package)})


# --- What it does ---


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"engram-jax {engram_jax.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"Example: engram-jax {command} " in words


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(any(line.startswith(f"    {command}") for line in lines) for command in COMMANDS)


def test_examples_are_commands():
    for command in COMMANDS:
        sub = main.parser()._subparsers._group_actions[0].choices[command]
        words = sub.epilog.removeprefix("Example: engram-jax ").replace("'def read('", "x").split()
        main.parser().parse_args(words)


def test_describe(capsys):
    out = succeeded(capsys, "describe", "tiny")
    assert "total (with LM head)" in out
    assert "memory tables" in out


@pytest.mark.parametrize(("name", "settings", "line"), [
    ("engram-27b", [], "streams lie                 auto: apart on TPUs, else joined"),
    ("engram-27b", ["model.stream_layout=joined"], "streams lie                       joined"),
    ("tiny", [], None)])
def test_describe_says_how_streams_lie(capsys, name, settings, line):
    out = succeeded(capsys, "describe", name, *(f"--set={each}" for each in settings))
    told = [each.strip() for each in out.splitlines() if "streams lie" in each]
    assert told == ([line] if line else [])


def test_describe_json(capsys):
    found = json.loads(succeeded(capsys, "describe", "engram-27b", "--json"))
    assert {"total_params", "active_params", "sparse_params", "engram_params", "rho",
            "flops_per_token", "table_bytes_per_token"} <= set(found)
    assert round(found["engram_params"] / 1e9, 2) == 5.79
    assert round(found["rho"], 4) == 0.7435


def test_describe_takes_settings(capsys):
    wide = json.loads(succeeded(
        capsys, "describe", "tiny", "--json", "--set", "model.engram.rows_per_head=[512,512]"))
    assert wide["engram_params"] < 512 * 16 * 8 * 1.2


def test_describe_takes_a_run_a_config_and_a_function(trained, capsys, tmp_path, monkeypatch):
    counts = json.loads(succeeded(capsys, "describe", "micro", "--json"))
    own = tmp_path / "own.json"
    own.write_bytes((trained / "config.json").read_bytes())
    (tmp_path / "my_recipes.py").write_text(
        "from engram_jax.recipes import recipe\nmine = lambda: recipe('micro')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in (trained, trained / "config.json", "own.json", "my_recipes:mine"):
        assert json.loads(succeeded(capsys, "describe", name, "--json")) == counts
    monkeypatch.delitem(sys.modules, "my_recipes")


def test_the_recipe_that_the_readme_shows_trains(capsys, tmp_path, monkeypatch, text):
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    block, = re.findall(r"```python\n([^`]*def mine[^`]*)```", readme)
    (tmp_path / "my_recipes.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_recipes", raising=False)  # another test's
    succeeded(capsys, "train", "my_recipes:mine", "--out", "runs/other",
              "--set", "training.steps=1", "--set", "training.evaluate_batches=1",
              "--set", "data.batch_size=2", "--set", "data.sequence_length=16",
              "--set", f"data.path={text}", "--set", "data.tokenizer=bpe:300",
              "--set", f"data.cache_dir={tmp_path}", "--set", "model.vocab_size=300",
              "--set", "model.depth=2")
    config = RunDirectory(tmp_path / "runs" / "other").config()
    assert (config.name, config.model.width) == ("mine", 128)
    sys.modules.pop("my_recipes", None)


@pytest.mark.parametrize(("config", "line"), [
    ("{}", "name: is missing"), ('{"nam": "x"}', "nam: no such field"), ("[1]", ""),
    ('{"name": "x", "data": {"seed": "y"}, "model": 3, "optimizer": {}, "training": {}}',
     "data.seed = 'y': must be a whole number")])
def test_a_config_that_is_wrong_is_named(config, line, capsys, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(config)
    assert f"{file}: {line}" in refused(capsys, "describe", file)


def test_a_config_may_be_changed_and_trained(trained, capsys, tmp_path):
    out = succeeded(capsys, "train", trained / "config.json", "--out", tmp_path / "run",
                    "--set", "training.steps=1")
    assert "bits per byte" in out
    assert RunDirectory(tmp_path / "run").config().training.steps == 1


def test_fields_tells_one_field_a_part_or_all(capsys):
    out = succeeded(capsys, "fields", "optimizer.warmup_steps")
    assert out.startswith("optimizer.warmup_steps  (whole number, default 2000)\n    steps in ")
    part = json.loads(succeeded(capsys, "fields", "model.moe", "--json"))
    assert [field["name"] for field in part][:2] == ["model.moe.experts", "model.moe.top_k"]
    assert all(field["name"].startswith("model.moe.") for field in part)
    everything = json.loads(succeeded(capsys, "fields", "--json"))
    assert len(everything) > 90
    assert "did you mean model.width?" in refused(capsys, "fields", "width")


def test_train_leaves_a_finished_run(trained, text, recipe):
    records = RunDirectory(trained)
    assert records.config().data.path == text
    assert records.config().model == recipe.model
    assert records.result()["steps"] == recipe.training.steps


def test_train_again_trains_nothing(trained, text, capsys):
    out = succeeded(capsys, "train", "micro", "--out", trained, "--set", f"data.path={text}")
    assert "done before" in out
    assert f"engram-jax generate {trained}" in out


def test_evaluate_gives_the_result_of_the_run(trained, capsys):
    found = json.loads(succeeded(capsys, "evaluate", trained, "--json"))
    result = RunDirectory(trained).result()
    assert found == {"loss": pytest.approx(result["loss"], rel=1e-6),
                     "bits_per_byte": pytest.approx(result["bits_per_byte"], rel=1e-6),
                     "tokens": result["validation_tokens"]}
    line = succeeded(capsys, "evaluate", trained)
    assert line.startswith(f"loss {found['loss']:.4f} nats a token")


def test_evaluate_prints_json_alone_on_text_that_it_has_to_pack(trained, capsys, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=9)
    out = succeeded(capsys, "evaluate", trained, "--json", "--set", f"data.path={other}")
    assert json.loads(out)["loss"] != RunDirectory(trained).result()["loss"]


@pytest.mark.parametrize("words", [
    ("--ruler", "64"), ("--tasks", "piqa"), ("--positions",), ("--longppl", "masks.json")])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_question_is_refused(trained, capsys, words, limit):
    assert f"limit = {limit}" in refused(capsys, "evaluate", trained, *words, "--limit", limit)
    assert f"limit = {limit}" in refused(
        capsys, "analyze", "suppression", trained, "--harness", "piqa", "--limit", limit)


def test_generate_is_greedy_unless_told_to_sample(trained, capsys):
    def made(*words):
        return succeeded(capsys, "generate", trained, "--prompt", "kalo mi", "--tokens", 12, *words)

    greedy = made()
    assert greedy.startswith("kalo mi")
    assert len(greedy) > len("kalo mi\n")
    assert made("--seed", 3) == greedy
    drawn = made("--temperature", 1, "--seed", 3)
    assert made("--temperature", 1, "--seed", 3) == drawn
    assert made("--temperature", 1, "--seed", 4) != drawn


def test_generate_goes_on_behind_a_prompt_longer_than_the_window(trained, capsys):
    prompt = "kalo misu tera " * 20
    assert succeeded(
        capsys, "generate", trained, "--prompt", prompt, "--tokens", 2).startswith(prompt)


def test_sweep_says_what_to_do_next(trained, text, recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep.Sweep, "runs", lambda chosen, match: sweep.seeded(
        [with_settings(recipe, [f"name={name}", *chosen.settings])
         for name in ("no-memory", "ngrams")], chosen.seeds))
    out = succeeded(capsys, "sweep", "controls", "--out", tmp_path, "--seeds", 1,
                    "--allow-dirty", "--set", f"data.path={text}")
    assert re.search(rf"next: engram-jax generate {tmp_path}/(no-memory|ngrams)-seed0 ", out)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("deed", [evaluation.evaluate, runs.reproduce, results.analyze,
                                  results.report, serving.generate])
def test_what_compiles_keeps_its_programs(deed):
    assert deed.__wrapped__.__name__ == deed.__name__


def test_programs_are_kept_in_the_users_cache(monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        kept = keeping_programs(
            lambda options: jax.config.values["jax_compilation_cache_dir"])(None)
        assert kept.startswith(os.environ["ENGRAM_CACHE"])
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("plugin", "before", "after"), [
    (True, "", "--xla_gpu_deterministic_ops=true"),
    (True, "--x=1", "--x=1 --xla_gpu_deterministic_ops=true"),
    (True, "--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
    (False, "--x=1", "--x=1"),
])
def test_gpus_are_asked_for_the_same_bits(plugin, before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(settled.importlib.util, "find_spec", lambda name: plugin or None)
    settled.settle_sums()
    assert os.environ["XLA_FLAGS"] == after


# --- What the user can mend: exit code 2 ---


@pytest.mark.parametrize(("setting", "words"), [
    ("model.widht=3", ["widht", "no such field", "width"]),
    ("widht", ["widht", "field=value"]),
    ("nope.width=3", ["nope"]),
    ("model.width.more=3", ["width", "no fields of its own"]),
    ("model.over_encoding.heads=2", ["over_encoding", "not part of this recipe"]),
    ("model.width=wide", ["model.width = 'wide'", "whole number"]),
    ("model.width=3.5", ["model.width = 3.5", "whole number"]),
    ("model.width=0", ["model.width = 0", "at least 1"]),
    ("model.tied_head=1", ["model.tied_head = 1", "true or false"]),
    ("model.compute_dtype=int8", ["compute_dtype", "int8", "bfloat16"]),
    ("model.engram.rows_per_head=[]", ["rows_per_head = ()", "order"]),
    ("model.engram.rows_per_head=[64]", ["rows_per_head = (64,)", "order"]),
    ("model.engram.rows_per_head=[64,64,64]", ["rows_per_head = (64, 64, 64)", "order"]),
    ("model.engram.rows_per_head=[64,1.5]", ["rows_per_head", "1.5", "whole number"]),
    ("model.engram.rows_per_head=[64,0]", ["rows_per_head = (64, 0)", "at least 2"]),
    ("model.engram.rows_per_head=[2000000000,2000000000]", ["rows_per_head", "2**31"]),
    ("model.engram.layers=[7]", ["layers = (7,)", "out of range"]),
    ("model.engram.layers=[-1]", ["layers = (-1,)"]),
    ("model.engram.layers=[]", ["layers = ()", "would not be used"]),
    ("model.moe.top_k=9", ["top_k = 9"]),
    ("model.attention.rope_dim=3", ["rope_dim = 3", "even"]),
    ("optimizer.learning_rate=-1", ["optimizer.learning_rate = -1", "positive"]),
    ("optimizer.learning_rate=NaN", ["optimizer.learning_rate = nan"]),
    ("optimizer.decay_at=[0.5]", ["decay_at"]),
    ("training.steps=0", ["training.steps = 0"]),
    ("training.seed=-1", ["training.seed = -1"]),
    ("data.batch_size=0", ["data.batch_size = 0"]),
    ("data.path=", ["data.path = ''"]),
])
def test_a_bad_setting_names_field_and_value(setting, words, capsys):
    error = refused(capsys, "describe", "tiny", "--set", setting)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("words", "said"), [
    (["describe", "tinny"], ["recipe = 'tinny'", "tiny", "engram-27b"]),
    (["train", "tinny", "--out", "x"], ["recipe = 'tinny'"]),
    (["describe", "no_such_module:run"], ["'no_such_module:run'", "no module 'no_such_module'"]),
    (["describe", "json:run"], ["'json:run'", "json has no run"]),
    (["describe", "os:getcwd"], ["'os:getcwd'", "RunConfig", "returns a str"]),
    (["describe", "tests"], ["no such recipe", "config.json"]),
    (["describe", "README.md"], ["README.md: is not JSON"]),
    (["describe", "ftp://x/config.json"], ["ftp://x/config.json", "gs://"]),
    (["train", "tiny"], ["--out"]),
    (["sweep", "nope", "--out", "x"], ["experiment = 'nope'", "memory_scaling"]),
    (["sweep", "controls"], ["out = None", "--out"]),
    (["sweep", "controls", "--out", "x", "--seeds", "two"], ["seeds = 'two'", "0,1,4"]),
    (["sweep", "controls", "--out", "x", "--seeds", "1,2,1"], ["seeds = [1, 2, 1]", "has 1 more"]),
    (["sweep", "controls", "--out", "x", "--seeds", "0"], ["seeds = []"]),
    (["sweep", "controls", "--out", "x", "--scale", "big"], ["scale = 'big'", "tiny"]),
    (["evaluate", "/nowhere/at/all"], ["/nowhere/at/all"]),
    (["generate", "/nowhere/at/all", "--prompt", "x"], ["/nowhere/at/all"]),
    (["generate", "x", "--prompt", "x", "--tokens", "many"], ["--tokens", "many"]),
    (["bench", "nothing"], ["nothing"]),
    (["fly"], ["fly"]),
    ([], ["COMMAND"]),
])
def test_a_bad_command_is_one_line(words, said, capsys):
    error = refused(capsys, *words)
    assert all(word in error for word in said), error


def train(place, *settings):
    return ["train", "micro", "--out", place / "run",
            *(word for setting in settings for word in ("--set", setting))]


@pytest.mark.parametrize(("name", "data", "said"), [
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b" \n\n", "holds no text"),
    ("binary.txt", b"ab\0cd" * 100, "NUL"),
    ("latin.txt", b"caf\xe9 " * 100, "UTF-8"),
    ("short.txt", b"a few words", "tokens"),
    ("bad.jsonl", b"{\n", "is not JSON"),
    ("fields.jsonl", b'{"body": "x"}\n', "text_field"),
])
def test_bad_text(name, data, said, capsys, tmp_path):
    (tmp_path / name).write_bytes(data)
    error = refused(capsys, *train(tmp_path, f"data.path={tmp_path / name}"))
    assert "data." in error
    assert said in error
    assert not (tmp_path / "run").exists()


def test_text_that_is_not_there(capsys, tmp_path):
    error = refused(capsys, *train(tmp_path, f"data.path={tmp_path / 'none.txt'}"))
    assert "does not exist" in error


def test_data_that_does_not_fit_the_model(capsys, tmp_path, text):
    path = f"data.path={text}"
    assert "data.tokenizer = 'bpe:10'" in refused(
        capsys, *train(tmp_path, path, "data.tokenizer=bpe:10"))
    assert "model.vocab_size = 270" in refused(
        capsys, *train(tmp_path, path, "model.vocab_size=270"))
    assert "data.batch_size = 5000" in refused(
        capsys, *train(tmp_path, path, "data.batch_size=5000"))
    assert "data.sequence_length = 100000" in refused(
        capsys, *train(tmp_path, path, "data.sequence_length=100000"))


def test_a_folder_that_is_a_file(capsys, tmp_path, text):
    (tmp_path / "run").write_text("")
    error = refused(capsys, *train(tmp_path, f"data.path={text}"))
    assert "out = " in error
    assert "is not a folder" in error
    assert refused(capsys, "evaluate", tmp_path / "run")


def test_a_folder_of_another_run(capsys, trained, text):
    error = refused(capsys, "train", "micro", "--out", trained, "--set", f"data.path={text}",
                    "--set", "training.steps=8")
    assert "training.steps = 8" in error
    assert "a run with 7" in error


def test_folders_that_hold_no_run(capsys, tmp_path):
    assert "config.json" in refused(capsys, "evaluate", tmp_path)
    for content in ("{", "[]", "3", '{"name": "x"}'):
        (tmp_path / "config.json").write_text(content)
        refused(capsys, "generate", tmp_path, "--prompt", "x")


def test_a_run_without_a_checkpoint(capsys, trained, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    assert "no checkpoint yet" in refused(capsys, "generate", tmp_path, "--prompt", "x")


@pytest.mark.parametrize("words", [
    ["--prompt", ""],
    ["--prompt", "x", "--tokens", "0"],
    ["--prompt", "x", "--temperature", "-1"],
    ["--prompt", "x", "--temperature", "nan"],
])
def test_generating_nothing(words, capsys, trained):
    error = refused(capsys, "generate", trained, *words)
    assert words[-2].removeprefix("--") + " = " in error


def test_another_tokenizer(capsys, trained, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=5)
    error = refused(capsys, "evaluate", trained, "--set", f"data.path={other}",
                    "--set", "data.tokenizer=bpe:300")
    assert "another tokenizer" in error
    assert "digest" in error


@pytest.mark.parametrize(("setting", "said"), [
    ("model.width=48", "the model wants"),
    ("model.engram.hash_seed=4", "hash.json: memory 'layer_0'"),
    ("model.engram.rows_per_head=[64,64]", "hash.json: memory 'layer_0'"),
    ("model.engram=none", "hash.json: memory 'layer_0'"),
])
def test_another_model(setting, said, capsys, trained):
    assert said in refused(capsys, "evaluate", trained, "--set", setting)


def test_in_a_process_of_its_own(tmp_path):
    for words, said in [
        (["describe", "tinny"], "recipe = 'tinny'"),
        (["train", "tiny", "--out", tmp_path / "run", "--set", "data.path=/nowhere"],
         "data.path = '/nowhere'"),
    ]:
        done = in_a_process(*words)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert said in done.stderr


# --- What the machine has to answer for: exit code 1 ---


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"),
])
def test_the_machines_faults(error, capsys, monkeypatch, trained):
    def fails(*words):
        raise error

    monkeypatch.setattr(evaluation, "_restored", fails)
    line = refused(capsys, "evaluate", trained, code=1)
    assert any(word in line for word in ("No space left", "MemoryError", "out of memory"))


def test_a_damaged_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / str(STEPS) / "state").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:100])
    done = in_a_process("evaluate", tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"checkpoints/{STEPS}: cannot be read" in done.stderr


def test_a_bug_is_not_hidden(monkeypatch, trained):
    def fails(*words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(evaluation, "_restored", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["evaluate", str(trained)])


def test_stopping_by_hand(capsys, monkeypatch, trained):
    def stops(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "_restored", stops)
    assert "goes on from the last checkpoint" in refused(capsys, "evaluate", trained, code=130)
