"""A run is a value: it survives JSON, and says in one line what is wrong with it."""

import dataclasses
import json

import pytest

from engram_jax.config import EngramConfig, HashConfig, MoEConfig, RunConfig
from engram_jax.errors import UserError
from engram_jax.recipes import RECIPES, recipe, with_over_encoding, without_memory
from engram_jax.settings import changed, from_dict, paths, to_dict, to_json, with_settings

TINY = recipe("tiny")


def error_of(function, *arguments, **keywords):
    """The one line that the call fails with."""
    with pytest.raises(UserError) as failure:
        function(*arguments, **keywords)
    line = str(failure.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    run = recipe(name)
    assert run.name == name
    assert from_dict(json.loads(to_json(run))) == run
    assert to_json(from_dict(to_dict(run))) == to_json(run)
    assert hash(from_dict(to_dict(run))) == hash(run)
    assert with_settings(run, []) == run


@pytest.mark.parametrize("change", [with_over_encoding, without_memory])
def test_variants_survive_json(change):
    run = change(TINY)
    assert from_dict(json.loads(to_json(run))) == run
    assert run != TINY


def test_configs_are_frozen():
    for config in (TINY, TINY.model, TINY.model.engram, TINY.data):
        hash(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.name = "other"


def leaves(values, path=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_set_to_what_it_is(name):
    run = recipe(name)
    settings = [f"{path}={value if isinstance(value, str) else json.dumps(value)}"
                for path, value in leaves(to_dict(run))]
    assert len(settings) > 50
    assert with_settings(run, [s for s in settings if s != "model.remat=none"]) == run


def test_the_text_none():
    assert with_settings(recipe("small"), ["model.remat=none"]).model.remat == "none"


@pytest.mark.parametrize(("setting", "field", "value"), [
    ("training.steps=7", "training.steps", 7),
    (" training.steps = 7 ", "training.steps", 7),
    ("model.norm_eps=1", "model.norm_eps", 1.0),
    ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
    ("optimizer.decay_at=[0.5, 1]", "optimizer.decay_at", (0.5, 1.0)),
    ("model.engram.layers=[0,2]", "model.engram.layers", (0, 2)),
    ("model.engram.layers=2", "model.engram.layers", (2,)),
    ("model.tied_head=true", "model.tied_head", True),
    ("model.tied_head=True", "model.tied_head", True),
    ("model.moe=none", "model.moe", None),
    ("model.engram=null", "model.engram", None),
    ("data.path=/a/b=c.txt", "data.path", "/a/b=c.txt"),
    ("data.path=2024", "data.path", "2024"),
    ("name=my run", "name", "my run"),
    ('model.moe={"experts": 4, "top_k": 1}', "model.moe", MoEConfig(experts=4, top_k=1)),
])
def test_with_settings(setting, field, value):
    found = with_settings(TINY, [setting])
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_settings_are_applied_in_order():
    run = with_settings(TINY, ["training.steps=1", "model.engram.layers=[0]", "training.steps=2"])
    assert (run.training.steps, run.model.engram.layers) == (2, (0,))
    assert TINY.training.steps not in (1, 2)


def test_a_part_that_is_taken_away_takes_its_settings_along():
    run = with_settings(TINY, ["model.engram.layers=[0]", "model.engram=none"])
    assert run.model.engram is None


def test_changed_is_nested_replacing():
    engram = dataclasses.replace(TINY.model.engram, layers=(0, 3))
    nested = dataclasses.replace(
        TINY, name="other", model=dataclasses.replace(TINY.model, depth=4, engram=engram))
    # In any order: parts are checked once all of their fields are there.
    assert nested == changed(TINY, {
        "model.engram.layers": (0, 3), "name": "other", "model.depth": 4})
    assert changed(TINY.model, {"engram": engram, "engram.layers": (1,)}) == TINY.model
    assert changed(TINY, {}) == TINY


def test_changed_takes_values_as_settings_do():
    run = changed(TINY, {"model.moe": {"experts": 4, "top_k": 1}, "model.norm_eps": 1})
    assert run.model.moe == MoEConfig(experts=4, top_k=1)
    assert type(run.model.norm_eps) is float


@pytest.mark.parametrize(("changes", "words"), [
    ({"model.width": "64"}, ["model.width = '64'", "whole number"]),
    ({"model.widht": 64}, ["model.widht: no such field", "did you mean model.width?"]),
    ({"model.engram.layers": 1.5}, ["model.engram.layers", "1.5"]),
    ({"model.width.more": 1}, ["model.width.more", "no fields"]),
    ({"model.over_encoding.heads": 2}, ["model.over_encoding", "not part of this recipe"]),
    ({"model.engram": TINY.model.moe}, ["model.engram", "must be an object with fields"]),
    ({"model.depth": 1}, ["model.engram.layers", "0..0"]),
])
def test_changed_refuses_by_name(changes, words):
    line = error_of(changed, TINY, changes)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("written", "meant"), [
    ("width", "did you mean model.width?"),
    ("engram.layers", "did you mean model.engram.layers?"),
    ("model.rows_per_head", "model.engram.rows_per_head or model.over_encoding.rows_per_head?"),
    ("model.widht", "did you mean model.width?"),
    ("modle.width", "did you mean model.width?"),
    ("stpes", "did you mean training.steps?"),
    ("model.engram.rows", "did you mean model.engram.rows_per_head?"),
    ("seed", "did you mean data.seed or training.seed?"),
    ("xyzzy", "there are baseline, data, model, name, optimizer, training"),
])
def test_a_field_that_is_not_there_names_the_one_that_was_meant(written, meant):
    line = error_of(with_settings, TINY, [f"{written}=1"])
    assert line.endswith(meant)


def test_every_path_leads_to_a_field():
    names = [name for name, _ in paths(RunConfig)]
    assert len(names) == len(set(names))
    assert {"name", "model", "model.engram.layers", "training.steps"} <= set(names)
    plain = {name for name, _ in leaves(to_dict(TINY))}
    assert plain - {"model.moe", "model.engram", "model.over_encoding"} <= set(names)


# Each line must hold every one of the words: the field, the value, and what would be right.
@pytest.mark.parametrize(("setting", "words"), [
    ("training.step=5", ["training.step:", "no such field", "steps"]),
    ("trainin.steps=5", ["trainin:", "no such field", "training"]),
    ("model.engram.rows=5", ["model.engram.rows:", "no such field", "rows_per_head"]),
    ("=5", ["no such field"]),
    ("training.steps", ["training.steps", "field=value"]),
    ("training.steps.x=5", ["training.steps.x", "no fields"]),
    ("model.over_encoding.heads=2", ["model.over_encoding", "not part of this recipe"]),
    ("training.steps=many", ["training.steps", "'many'", "whole number"]),
    ("training.steps=1.5", ["training.steps", "1.5", "whole number"]),
    ("training.steps=true", ["training.steps", "True", "whole number"]),
    ("training.steps=none", ["training.steps", "None", "whole number"]),
    ("training.steps=[1]", ["training.steps", "[1]", "whole number"]),
    ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "'fast'", "a number"]),
    ("optimizer.learning_rate=false", ["optimizer.learning_rate", "False", "a number"]),
    ("model.tied_head=1", ["model.tied_head", "1", "true or false"]),
    ("model.tied_head=yes", ["model.tied_head", "'yes'", "true or false"]),
    ("data.path=", ["data.path", "''"]),
    ("model.engram.layers=one", ["model.engram.layers", "'one'", "list of int"]),
    ("model.engram.layers=[1.5]", ["model.engram.layers", "1.5", "whole number"]),
    ('model.engram.layers=["1"]', ["model.engram.layers", "'1'", "whole number"]),
    ("model.attention=5", ["model.attention", "5", "object with fields"]),
    ('model.moe={"top_k": 1}', ["model.moe.experts", "missing"]),
    ('model.moe={"experts": 4, "topk": 1}', ["model.moe.topk", "no such field", "top_k"]),
    ("model.engram.rows_per_head=[]", ["rows_per_head", "()", "each n-gram order"]),
    ("model.engram.rows_per_head=4096", ["rows_per_head", "(4096,)", "needs 2 entries", "2..3"]),
    ("model.engram.max_order=4", ["rows_per_head", "needs 3 entries", "2..4"]),
    ("model.engram.max_order=1", ["max_order", "1", "at least 2"]),
    ("model.engram.rows_per_head=[100, 1]", ["rows_per_head", "(100, 1)", "at least 2"]),
    ("model.engram.rows_per_head=[300000000,300000000]", ["rows_per_head", "300000000", "2**31"]),
    ("model.engram.heads=0", ["heads", "0", "at least 1"]),
    ("model.engram.shards=0", ["shards", "0", "1..65536"]),
    ("model.engram.table_std=-1", ["table_std", "-1", "negative"]),
    ("model.engram.layers=[]", ["layers", "()", "not be used"]),
    ("model.engram.layers=[2,1]", ["layers", "(2, 1)", "ascending"]),
    ("model.engram.layers=[1,1]", ["layers", "(1, 1)", "ascending"]),
    ("model.engram.layers=[-1,1]", ["layers", "(-1, 1)", "0-based"]),
    ("model.engram.layers=[3]", ["model.engram.layers", "(3,)", "0..2"]),
    ("model.depth=1", ["model.engram.layers", "(1,)", "0..0"]),
    ("model.engram.head_dim=0", ["head_dim", "0", "at least 1"]),
    ("model.engram.kernel=-1", ["kernel", "-1", "negative"]),
    ("model.engram.dilation=-1", ["dilation", "-1", "negative"]),
    ("model.moe.top_k=9", ["top_k", "9", "1..8"]),
    ("model.moe.top_k=0", ["top_k", "0", "1..8"]),
    ("model.moe.experts=1", ["top_k", "2", "1..1"]),
    ("model.moe.shared=-1", ["shared", "-1", "negative"]),
    ("model.moe.dense_layers=3", ["model.moe.dense_layers", "3", "below the depth"]),
    ("model.attention.rope_dim=3", ["rope_dim", "3", "even"]),
    ("model.attention.heads=0", ["heads", "0", "at least 1"]),
    ("model.width=0", ["model.width", "0", "at least 1"]),
    ("model.streams=0", ["model.streams", "0", "at least 1"]),
    ("model.compute_dtype=float16", ["model.compute_dtype", "'float16'", "bfloat16"]),
    ("model.remat=all", ["model.remat", "'all'", "none, outputs, ffn, block, auto"]),
    ("training.accumulate=-1", ["training.accumulate", "-1", "not be negative"]),
    ("data.sequence_length=0", ["data.sequence_length", "0", "at least 1"]),
    ("data.batch_size=-8", ["data.batch_size", "-8", "at least 1"]),
    ("data.validation_fraction=1", ["data.validation_fraction", "1.0", "between 0 and 1"]),
    ("optimizer.learning_rate=0", ["optimizer.learning_rate", "0.0", "positive"]),
    ("optimizer.learning_rate=NaN", ["optimizer.learning_rate", "nan", "positive"]),
    ("optimizer.warmup_steps=-1", ["optimizer.warmup_steps", "-1", "negative"]),
    ("optimizer.decay_at=[0.5]", ["optimizer.decay_at", "(0.5,)", "2"]),
    ("optimizer.decay_at=[0.5,1.5]", ["optimizer.decay_at", "1.5", "(0, 1]"]),
    ("optimizer.decay_at=[0.5,0.5]", ["optimizer.decay_at", "(0.5, 0.5)", "ascending"]),
    ("optimizer.decay_to=[0.1,0.3]", ["optimizer.decay_to", "(0.1, 0.3)", "none above"]),
    ("optimizer.decay_to=[1.5,1]", ["optimizer.decay_to", "(1.5, 1.0)", "[0, 1]"]),
    ("optimizer.schedule=cosine", ["optimizer.schedule", "'cosine'", "step, wsd"]),
    ("optimizer.decay_share=0", ["optimizer.decay_share", "0.0", "(0, 1]"]),
    ("optimizer.decay_floor=2", ["optimizer.decay_floor", "2.0", "[0, 1]"]),
    ("optimizer.clip_norm=0", ["optimizer.clip_norm", "0.0", "positive"]),
    ("training.steps=0", ["training.steps", "0", "at least 1"]),
    ("data.seed=-1", ["data.seed", "-1", "not be negative"]),
    ("training.seed=-1", ["training.seed", "-1", "negative"]),
    ("training.keep_checkpoints=0", ["training.keep_checkpoints", "0", "at least 1"]),
    ("training.log_every=-1", ["training.log_every", "-1", "negative"]),
])
def test_a_wrong_setting_is_one_clear_line(setting, words):
    line = error_of(with_settings, TINY, [setting])
    for word in words:
        assert word in line


def test_settings_of_over_encoding():
    run = with_over_encoding(TINY)
    line = error_of(with_settings, run, ["model.over_encoding.heads=5"])
    assert "model.over_encoding.heads = 5" in line
    assert "10 sub-tables" in line
    assert "width 96" in line
    assert "model.engram" in error_of(with_settings, run, ["model.engram.heads=5"])


def test_an_unknown_recipe_names_those_there_are():
    line = error_of(recipe, "engram-28b")
    assert all(name in line for name in ("engram-28b", *RECIPES))


def test_replacing_no_memory_by_over_encoding():
    assert "no memory" in error_of(with_over_encoding, without_memory(TINY))


def test_a_stored_run_with_an_unknown_or_missing_field():
    values = to_dict(TINY)
    assert "colour: no such field" in error_of(from_dict, values | {"colour": "red"})
    values["model"]["depht"] = values["model"].pop("depth")
    assert "model.depht: no such field" in error_of(from_dict, values)
    del values["model"]["depht"]
    assert "model.depth: is missing" in error_of(from_dict, values)


def test_fields_with_a_default_may_be_absent():
    values = to_dict(TINY)
    del values["baseline"], values["model"]["tied_head"], values["model"]["moe"]
    run = from_dict(values)
    assert isinstance(run, RunConfig)
    assert (run.baseline, run.model.tied_head, run.model.moe) == ("", False, None)


def test_derived_sizes():
    config = EngramConfig(
        layers=(1,), rows_per_head=(10, 20, 30), max_order=4, heads=8, head_dim=5)
    assert (config.max_order, config.total_heads, config.memory_dim) == (4, 24, 120)
    assert config.conv_dilation == 4
    assert dataclasses.replace(config, dilation=2).conv_dilation == 2
    assert HashConfig(rows_per_head=(10,), max_order=2).total_heads == 8


@pytest.mark.parametrize("setting", [
    "optimizer.learning_rate=" + "9" * 400, f"optimizer.decay_at=[0.5,-{'9' * 400}]"])
def test_a_whole_number_that_no_float_holds_is_refused(setting):
    assert "must be a number below 1.8e308" in error_of(with_settings, TINY, [setting])
