"""Trained runs under EleutherAI's lm-evaluation-harness (extra `eval`).

    python -m engram_jax.evaluation --model engram_jax --model_args path=RUN --tasks arc_easy

is the harness's own command with this model added: the harness (0.4.13) finds no models of other
packages by itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.evaluation.benchmarks import FOLDER, Chosen
from engram_jax.evaluation.scoring import Scorer
from engram_jax.inference.engine import Engine, Request
from engram_jax.inference.serving import Served, served
from engram_jax.results.scores import Score
from engram_jax.runs.directory import RunDirectory
from engram_jax.storage import first_line

try:
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval import utils as harness_utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise UserError("evaluate needs lm-evaluation-harness: pip install 'engram_jax[eval]'"
                    ) from error

TOKENS = 256  # that are generated where a task does not say how many


@register_model("engram_jax")
class EngramLM(TemplateLM):
    """A run as the harness sees a language model.

    Args:
      path: the run's folder, or a run that is served.
      memory, dtype, mesh: where its tables and parameters lie and in what, as
        `inference.serving.served` takes them.
      batch_size: sequences at once.
      max_length: tokens that the model reads at most; 0 is the length that it was trained at, or
        to which it was extended. Longer contexts lose their beginning.

    Raises:
      UserError: no run, or a setting out of range.
    """

    def __init__(self, path: str | Served, memory: str = "device", dtype: str = "",
                 batch_size: int | str = 8, max_length: int = 0, mesh: str | None = None,
                 **_: Any):
        super().__init__()
        self._model = path if isinstance(path, Served) else served(
            RunDirectory(path), memory, dtype, mesh=mesh)
        self.scorer = Scorer(self._model, int(batch_size))
        trained = self._model.length
        self.max_length = int(max_length) or trained
        require(2 <= self.max_length <= trained, "max_length", self.max_length,
                f"must be in 2..{trained}, what the run was trained or extended to")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it also stands where a context is empty."""
        return self._model.reader.end_id

    @property
    def tokenizer_name(self) -> str:
        return self._model.reader.fingerprints()["tokenizer"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Raw ids; special ones are never added, as in training."""
        del add_special_tokens
        ids: list[int] = self._model.reader.tokenizer.encode(
            string, add_special_tokens=False).ids
        return ids

    def tok_decode(self, tokens: list[int]) -> str:
        """The text of raw ids."""
        text: str = self._model.reader.tokenizer.decode(tokens)
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (words, context, continuation): its log-likelihood, and whether it is greedy."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)),
                       key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        for start in range(0, len(order), self.scorer.batch_size):
            chosen = order[start:start + self.scorer.batch_size]
            pairs = [(requests[n][1], requests[n][2]) for n in chosen]
            for number, answer in zip(chosen, self._scored(pairs), strict=True):
                out[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return out

    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        whole = [(context + continuation)[-(self.max_length + 1):]
                 for context, continuation in pairs]
        longest = max(map(len, whole)) - 1
        tokens_BT = np.full((2, len(whole), longest), self._model.reader.pad_id, np.int32)
        for row, ids in enumerate(whole):
            tokens_BT[0, row, :len(ids) - 1], tokens_BT[1, row, :len(ids) - 1] = ids[:-1], ids[1:]
        losses_BT, greedy_BT = self.scorer(*tokens_BT)
        answers = []
        for row, ((_, continuation), ids) in enumerate(zip(pairs, whole, strict=True)):
            require(len(continuation) <= self.max_length, "continuation",
                    f"{len(continuation)} tokens", f"is longer than max_length {self.max_length}")
            told = slice(len(ids) - 1 - len(continuation), len(ids) - 1)
            answers.append((-float(losses_BT[row, told].sum()), bool(greedy_BT[row, told].all())))
        return answers

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of `max_length` that do not overlap."""
        del disable_tqdm
        out = []
        for request in requests:
            (text,) = request.args
            windows = map(harness_utils.make_disjoint_window,
                          harness_utils.get_rolling_token_windows(
                              self.tok_encode(text), self.eot_token_id, self.max_length, 1))
            scored = self._loglikelihood_tokens([(None, *window) for window in windows])
            out.append(sum(likelihood for likelihood, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first stop string."""
        del disable_tqdm
        asked = [request.args for request in requests]
        made = self._engine.generate([self._request(*words) for words in asked])
        out = []
        for ids, words in zip(made, asked, strict=True):
            text = self.tok_decode([token for token in ids if token != self.eot_token_id])
            for stop in _stops(words[1]):
                text = text.split(stop)[0]
            out.append(text)
            self.cache_hook.add_partial("generate_until", words, text)
        return out

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """A context loses its beginning where it leaves no room for the answer."""
        tokens = min(int(settings.get("max_gen_toks", TOKENS)), self.max_length - 1)
        prompt = self.tok_encode(context)[-(self.max_length - tokens):] or [self.eot_token_id]
        return Request(prompt=tuple(prompt), tokens=tokens, **_sampling(settings))

    @functools.cached_property
    def _engine(self) -> Engine:
        return self._model.engine(slots=self.scorer.batch_size, length=self.max_length)

    def close(self) -> None:
        """Stop the threads that fetch rows."""
        self._model.rows.close()


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    if not settings.get("do_sample", False):
        return {}
    return {"temperature": float(settings.get("temperature", 1.0)),
            "top_k": int(settings.get("top_k", 0)), "top_p": float(settings.get("top_p", 1.0))}


def _stops(settings: dict[str, Any]) -> list[str]:
    stops = settings.get("until") or []
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]



def evaluate(
    model: Served, chosen: Chosen, include: str = "", limit: int | None = None,
    batch_size: int = 8, each: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """A run's results on tasks of the harness, as the harness has them.

    Args:
      model: the run.
      chosen: tasks or groups, with the examples before each question.
      include: a folder of further task files; "" is none.
      limit: questions of a task; None is all.
      batch_size: sequences at once.
      each: gets the results of each task or group as soon as it is done.

    Raises:
      UserError: a task that there is not; after all others are done, those whose data cannot be
        had, or that run what the model writes where that is not allowed.
    """
    manager = TaskManager(include_path=[str(FOLDER), *([include] if include else [])])
    for task in chosen.shots:
        if not manager.match_tasks([task]):
            raise UserError(f"tasks = {task!r}: the harness has no such task; `lm_eval ls tasks` "
                            "lists them, and --include FOLDER adds your own")
    lm, parts, failed = EngramLM(model, batch_size=batch_size), [], []
    for task, shots in chosen.shots.items():
        try:
            part = dict(simple_evaluate(
                lm, tasks=[task], task_manager=manager, num_fewshot=shots, limit=limit,
                log_samples=False, verbosity="ERROR",
                confirm_run_unsafe_code=chosen.unsafe) or {})
        except (OSError, DatasetsError) as error:
            failed.append(f"tasks = {task!r}: the data cannot be had ({first_line(error)})")
            continue
        except ValueError as error:
            if "marked as unsafe" not in str(error):
                raise
            failed.append(f"tasks = {task!r}: runs programs that the model writes; --unsafe-code "
                          "allows it")
            continue
        each(part)
        parts.append(part)
    if failed:
        raise UserError("; ".join(failed))
    return _together(parts)


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several calls of the harness as those of one."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, values in part.items():
            whole[name] = {**whole.get(name, {}), **values} if isinstance(values, dict) else values
    return whole


def scores(results: dict[str, Any], step: int, limit: int | None) -> list[Score]:
    """What scores.json keeps of results: every number but the standard errors."""
    return [Score(of="harness", task=task, metric=metric.removesuffix(",none"), step=step,
                  value=float(value),
                  settings={"shots": results.get("n-shot", {}).get(task), "limit": limit})
            for task, values in results["results"].items() for metric, value in values.items()
            if isinstance(value, int | float) and "stderr" not in metric
            and metric not in ("alias", "sample_len")]


def table(results: dict[str, Any]) -> str:
    """The harness's own table."""
    made: str = make_table(results)
    return made
