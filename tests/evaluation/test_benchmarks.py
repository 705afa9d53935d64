"""The paper's 27 benchmarks: every one is a task with its shots, or says why it is not."""

import json
import sys

import pytest

from engram_jax.cli.main import main
from engram_jax.errors import UserError
from engram_jax.evaluation.benchmarks import FOLDER, PAPER, chosen

# The paper's table 1.
SHOTS = {"MMLU": 5, "MMLU-Redux": 5, "MMLU-Pro": 5, "CMMLU": 5, "C-Eval": 5, "AGIEval": 0,
         "ARC-Easy": 25, "ARC-Challenge": 25, "TriviaQA": 5, "TriviaQA-ZH": 5, "PopQA": 15,
         "CCPM": 0, "BBH": 3, "HellaSwag": 0, "PIQA": 0, "WinoGrande": 5, "DROP": 1,
         "RACE-Middle": 5, "RACE-High": 5, "C3": 0, "HumanEval": 0, "MBPP": 3, "CruxEval-i": 0,
         "CruxEval-o": 0, "GSM8K": 8, "MGSM": 8, "MATH": 4}

# A question of each file of ours in the form of the public data, and what is made of it.
QUESTIONS = {
    "popqa": ({"question": "Where was X born?", "possible_answers": '["Rome", "Roma"]'},
              "Question: Where was X born?\nAnswer:", ["Rome", "Roma"], None),
    "ccpm": ({"translation": "昏暗的灯", "choices": ["a", "b", "c", "d"], "answer": 1},
             "昏暗的灯\n对应的古诗句是：", 1, ["a", "b", "c", "d"]),
    "c3": ({"id": 0, "context": ["一", "二"], "question": "谁？", "choice": ["甲", "乙"],
            "answer": "乙"}, "一\n二\n问题：谁？\n答案：", 1, ["甲", "乙"]),
    "race_middle": ({"article": "A b.", "question": "Who?", "options": ["p", "q", "r", "s"],
                     "answer": "C"},
                    "Article: A b.\n\nQuestion: Who?\nAnswer:", 2, ["p", "q", "r", "s"]),
}
QUESTIONS["race_high"] = QUESTIONS["race_middle"]


def test_all_27_are_there_with_the_papers_shots():
    assert {one.name: one.shots for one in PAPER} == SHOTS
    assert [one.name for one in PAPER if not one.tasks] == ["TriviaQA-ZH"]
    asked = chosen(["paper"], unsafe=True)
    assert asked.left_out == {"TriviaQA-ZH": "its questions are internal to the paper's authors"}
    assert asked.shots["popqa"] == 15
    assert asked.shots["minerva_math_precalc"] == 4
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(QUESTIONS) <= set(asked.shots)


def test_what_runs_programs_is_asked_only_where_that_is_allowed():
    left_out = chosen(["paper"]).left_out
    assert sorted(left_out) == ["CruxEval-i", "CruxEval-o", "HumanEval", "MBPP", "TriviaQA-ZH"]
    assert "--unsafe-code" in left_out["MBPP"]


def test_names_and_shots_of_the_users_own():
    assert chosen(["arc_easy", "RACE-Middle"]).shots == {"arc_easy": None, "race_middle": 5}
    assert chosen(["arc_easy", "mmlu"], shots=2).shots == {"arc_easy": 2, "mmlu": 2}
    assert set(chosen(["paper"], shots=0).shots.values()) == {0}
    for names, more, line in (
            ([], {}, "tasks = '': must name a task"),
            (["TriviaQA-ZH"], {}, "tasks = 'TriviaQA-ZH': its questions are internal"),
            (["CruxEval-i"], {}, "--unsafe-code allows it"),
            (["mmlu"], {"shots": -1}, "shots = -1: must not be negative")):
        with pytest.raises(UserError, match=line):
            chosen(names, **more)


def test_without_the_harness_there_is_one_line(trained, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"] + ["lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "engram_jax.evaluation.harness", raising=False)
    assert main(["evaluate", str(trained), "--tasks", "paper"]) == 2
    error = capsys.readouterr().err
    assert error == ("engram-jax: evaluate needs lm-evaluation-harness: "
                     "pip install 'engram_jax[eval]'\n")


@pytest.mark.filterwarnings("ignore")
def test_the_harness_has_every_task():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(FOLDER)])
    missing = [task for task in chosen(["paper"], unsafe=True).shots
               if not manager.match_tasks([task])]
    assert missing == []
    own = TaskManager()
    assert not [task for task in QUESTIONS if own.match_tasks([task])], "the harness has it by now"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", QUESTIONS)
def test_our_files_ask_what_the_public_data_asks(task, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    import yaml
    from lm_eval.tasks import TaskManager

    question, text, target, choices = QUESTIONS[task]
    (tmp_path / "data.jsonl").write_text(json.dumps(question) + "\n")
    file = yaml.safe_load((FOLDER / f"{task}.yaml").read_text())
    splits = {file[name]: str(tmp_path / "data.jsonl") for name in (
        "training_split", "validation_split", "test_split") if name in file}
    file.pop("dataset_name", None)
    file |= {"dataset_path": "json", "dataset_kwargs": {"data_files": splits}}
    (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(file, allow_unicode=True))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    made = manager.load([task])["tasks"][task]
    document = next(iter(made.eval_docs))
    assert made.doc_to_text(document) == text
    assert made.doc_to_target(document) == target
    if choices:
        assert made.doc_to_choice(document) == choices
