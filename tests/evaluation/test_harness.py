"""Runs under lm-evaluation-harness, on tasks with local data of each kind of request."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from engram_jax.cli.main import main
from engram_jax.errors import UserError
from engram_jax.evaluation.harness import EngramLM
from engram_jax.evaluation.retained import NoRows
from engram_jax.results.scores import scores_of
from engram_jax.runs.directory import RunDirectory

# The harness and what it imports warn of their own.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["ka", "lo mi", "su"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module", name="folder")
def tasks_with_local_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    words = ["ka lo", "", "mi su te ra no", "vi pe du " * 12]
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text or "te", "label": n % 3})
                              for n, text in enumerate(words)))
    for name, words in TASKS.items():
        (folder / f"{name}.yaml").write_text(words.replace("DATA", str(data)))
    return folder


@pytest.fixture(scope="module", name="lm")
def a_run_as_the_harness_sees_it(trained, compilations):
    lm = EngramLM(str(trained), batch_size=3)
    yield lm
    lm.close()


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=words, idx=n)
            for n, words in enumerate(arguments)]


PAIRS = [("ka lo", " mi"), ("", "te ra"), ("vi pe du " * 12, "ka"), ("no", " su te ra"),
         ("a ", "b")]


def directly(lm, context, continuation):
    """The log-likelihood of a continuation, cut from the left, one token after another."""
    first = lm.tok_encode(context) if context.rstrip() else [lm.eot_token_id]
    whole = lm.tok_encode(context + continuation)
    if not context:
        whole = first + whole
    stripped = lm.tok_encode(context.rstrip()) if context else first
    said = whole[len(stripped):]
    whole = whole[-(lm.max_length + 1):]
    losses = lm.scorer.losses(np.array(whole, np.int32))
    return -float(losses[len(whole) - len(said):].sum())


def test_likelihoods_are_those_of_the_run_in_any_order_and_batch(lm, trained):
    expected = [directly(lm, *pair) for pair in PAIRS]
    answers = [likelihood for likelihood, _ in lm.loglikelihood(
        instances("loglikelihood", PAIRS))]
    np.testing.assert_allclose(answers, expected, atol=1e-4)
    backwards = [likelihood for likelihood, _ in lm.loglikelihood(
        instances("loglikelihood", PAIRS[::-1]))]
    np.testing.assert_allclose(backwards[::-1], answers, atol=1e-4)
    for batch_size in (1, 16):
        other = EngramLM(str(trained), batch_size=batch_size)
        again = [likelihood for likelihood, _ in other.loglikelihood(
            instances("loglikelihood", PAIRS))]
        other.close()
        np.testing.assert_allclose(again, answers, atol=1e-4)


def test_a_rolling_likelihood_is_the_sum_over_windows(lm):
    text = "ka lo mi su te ra no vi pe du " * 5
    (answer,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * lm.max_length
    expected, before = 0.0, [lm.eot_token_id]
    for start in range(0, len(ids), lm.max_length):
        window = ids[start:start + lm.max_length]
        if len(window) < lm.max_length and start:  # the last one sees as far back as it may
            context = ids[len(ids) - lm.max_length - 1:start]
        else:
            context = before if not start else ids[start - 1:start]
        losses = lm.scorer.losses(np.array(context + window, np.int32))
        expected -= float(losses[len(context):].sum())
    assert answer == pytest.approx(expected, abs=1e-3)


def test_writing_stops_at_the_stop_string(lm):
    settings = {"max_gen_toks": 8, "until": []}
    whole = lm.generate_until(instances("generate_until", [("ka lo", settings)]))[0]
    assert whole
    stop = whole[len(whole) // 2]
    cut = lm.generate_until(instances(
        "generate_until", [("ka lo", {**settings, "until": [stop]})]))[0]
    assert cut == whole.split(stop)[0]


def test_the_harness_makes_its_table(lm, folder):
    results = simple_evaluate(
        lm, tasks=list(TASKS), task_manager=TaskManager(
            include_path=str(folder), include_defaults=False), bootstrap_iters=0)["results"]
    assert set(results) == set(TASKS)
    assert 0 <= results["choices"]["acc,none"] <= 1
    assert results["rolling"]["bits_per_byte,none"] > 0
    assert results["writing"]["exact_match,none"] == 0


def test_evaluate_prints_the_table(trained, folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), "--tasks", "choices", "--include", str(folder)]
    assert main(words) == 0
    assert "|choices|" in capsys.readouterr().out
    assert main([*words, "--json", "--limit", "2", "--memory", "host"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["choices"]["acc,none"] <= 1
    words[3] = "choice"
    assert main(words) == 2
    assert "'choice': the harness has no such task" in capsys.readouterr().err


def test_scores_are_kept_in_the_runs_folder(trained, folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), "--tasks", "choices,rolling", "--include",
             str(folder), "--limit", "2", "--shots", "0"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    kept = {(score.task, score.metric): score for score in scores_of(
        RunDirectory(tmp_path / "run"))}
    assert kept["choices", "acc"].value == said["choices"]["acc,none"]
    assert kept["rolling", "bits_per_byte"].step == 7
    assert kept["choices", "acc"].settings == {"shots": 0, "limit": 2}
    before = len(kept)
    assert main([*words, "--step", "6"]) == 0
    again = scores_of(RunDirectory(tmp_path / "run"))
    assert len(again) == 2 * before
    assert {score.step for score in again} == {6, 7}


def test_a_task_without_data_does_not_lose_the_others(trained, folder, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "tasks")
    lost = TASKS["choices"].replace("task: choices", "task: lost").replace("DATA", "nowhere.jsonl")
    (tmp_path / "tasks" / "lost.yaml").write_text(lost)
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", "lost,choices", "--include",
                 str(tmp_path / "tasks")]) == 2
    said = capsys.readouterr()
    assert "|choices|" in said.out
    assert "tasks = 'lost': the data cannot be had" in said.err
    assert {score.task for score in scores_of(RunDirectory(tmp_path / "run"))} == {"choices"}


def test_what_a_task_keeps_without_memory(trained, folder, capsys):
    words = ["analyze", "suppression", str(trained), "--harness", "choices,rolling", "--include",
             str(folder)]
    assert main(words) == 0
    shares = json.loads(capsys.readouterr().out)["micro"]["harness"]
    assert set(shares) == {"choices"}, "of bits less is better: no share"
    share = shares["choices"]["acc"]
    assert share["retained"] in (None, share["without"] / max(share["with"], 1e-9))
    assert main(["analyze", "gates", str(trained), "--harness", "choices"]) == 2
    assert "is of analyze suppression, not of analyze gates" in capsys.readouterr().err


def test_without_rows_the_network_reads_zeros(lm):
    tokens = np.arange(8, dtype=np.int32)[None] + 3
    rows, zeros = dict(lm._model.rows.request(tokens)), NoRows(lm._model.rows).request(tokens)
    assert {name: array.shape for name, array in rows.items()} == {
        name: array.shape for name, array in zeros.items()}
    assert all(np.any(array) for array in rows.values())
    assert not any(np.any(array) for array in zeros.values())


def test_what_there_is_not_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        EngramLM(str(tmp_path))
    with pytest.raises(UserError, match="max_length = 4096: must be in 2"):
        EngramLM(str(trained), max_length=4096)
