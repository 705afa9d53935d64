"""The paper's 27 benchmarks (arXiv 2601.07372, table 1) as tasks of lm-evaluation-harness 0.4.13.

Where the harness has no such task and the data is public, its file is in `tasks/` beside this one.
Prompts are the harness's and ours, not the paper's, which are not published.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from engram_jax.config import require
from engram_jax.errors import UserError

FOLDER = Path(__file__).with_name("tasks")
GROUP = "paper"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the paper's benchmarks.

    Attributes:
      name: as the paper has it.
      tasks: names of tasks or groups; none where there can be none.
      shots: examples before each question, in the paper.
      unsafe: programs that the model writes are run.
      note: why there is none, or where the task differs from the paper's.
    """

    name: str
    tasks: tuple[str, ...]
    shots: int
    unsafe: bool = False
    note: str = ""


MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory",
        "prealgebra", "precalc")
OURS = "of our own file, as the harness has no such task"
PAPER = (
    Benchmark("MMLU", ("mmlu",), 5),
    Benchmark("MMLU-Redux", ("mmlu_redux_generative",), 5, note="answers are written, not chosen"),
    Benchmark("MMLU-Pro", ("mmlu_pro",), 5),
    Benchmark("CMMLU", ("cmmlu",), 5),
    Benchmark("C-Eval", ("ceval-valid",), 5),
    Benchmark("AGIEval", ("agieval",), 0),
    Benchmark("ARC-Easy", ("arc_easy",), 25),
    Benchmark("ARC-Challenge", ("arc_challenge",), 25),
    Benchmark("TriviaQA", ("triviaqa",), 5),
    Benchmark("TriviaQA-ZH", (), 5, note="its questions are internal to the paper's authors"),
    Benchmark("PopQA", ("popqa",), 15, note=OURS),
    Benchmark("CCPM", ("ccpm",), 0, note=f"{OURS}; the validation split"),
    Benchmark("BBH", ("bbh_cot_fewshot",), 3),
    Benchmark("HellaSwag", ("hellaswag",), 0),
    Benchmark("PIQA", ("piqa",), 0),
    Benchmark("WinoGrande", ("winogrande",), 5),
    Benchmark("DROP", ("drop",), 1),
    Benchmark("RACE-Middle", ("race_middle",), 5, note=OURS),
    Benchmark("RACE-High", ("race_high",), 5, note=f"{OURS} that can be asked with shots"),
    Benchmark("C3", ("c3",), 0, note=f"{OURS}; the validation split"),
    Benchmark("HumanEval", ("humaneval",), 0, unsafe=True),
    Benchmark("MBPP", ("mbpp",), 3, unsafe=True),
    Benchmark("CruxEval-i", ("cruxeval_input",), 0, unsafe=True),
    Benchmark("CruxEval-o", ("cruxeval_output",), 0, unsafe=True),
    Benchmark("GSM8K", ("gsm8k",), 8),
    Benchmark("MGSM", ("mgsm_cot_native",), 8),
    Benchmark("MATH", tuple(f"minerva_math_{part}" for part in MATH), 4),
)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the harness is asked.

    Attributes:
      shots: tasks with the examples before each question; None is what the task says.
      left_out: by name why it is not asked.
      unsafe: programs that the model writes may be run.
    """

    shots: Mapping[str, int | None]
    left_out: Mapping[str, str]
    unsafe: bool = False

    def told(self) -> list[str]:
        """A line for each benchmark that is left out."""
        return [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]


def chosen(names: Sequence[str], shots: int | None = None, unsafe: bool = False) -> Chosen:
    """The tasks that a user named; `paper` is every benchmark of the paper with its shots.

    Args:
      names: of tasks or groups of the harness, of `PAPER` as the paper writes them, or `paper`.
      shots: for all of them; None is the paper's, or what a task says.
      unsafe: programs that the model writes may be run.

    Raises:
      UserError: no name; fewer shots than none; a benchmark that cannot be asked, by its name.
    """
    require(bool(names), "tasks", ",".join(names), "must name a task")
    require(shots is None or shots >= 0, "shots", shots, "must not be negative")
    # By the paper's name; a task that the harness calls so, too, keeps its own shots.
    known = {one.name.lower(): one for one in PAPER if one.name.lower() not in one.tasks}
    asked: dict[str, int | None] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name == GROUP:
            for one in PAPER:
                if reason := _reason(one, unsafe):
                    left_out[one.name] = reason
                else:
                    asked |= dict.fromkeys(one.tasks, one.shots if shots is None else shots)
        elif name.lower() in known:
            named = known[name.lower()]
            if reason := _reason(named, unsafe):
                raise UserError(f"tasks = {name!r}: {reason}")
            asked |= dict.fromkeys(named.tasks, named.shots if shots is None else shots)
        else:
            asked[name] = shots
    return Chosen(asked, left_out, unsafe)


def _reason(one: Benchmark, unsafe: bool) -> str:
    """Why a benchmark cannot be asked; "" where it can."""
    if not one.tasks:
        return one.note
    if one.unsafe and not unsafe:
        return "runs programs that the model writes; --unsafe-code allows it"
    return ""
