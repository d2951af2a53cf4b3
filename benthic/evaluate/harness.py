"""lm-eval's tasks (the "harness") on Benthic's models: https://github.com/EleutherAI/lm-evaluation-harness.

Import this module only where lm-eval is wanted, for it takes seconds to load; :func:`harness` tells when it is missing.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benthic.config.schema import InferenceConfig
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, MissingExtra
from benthic.evaluate.generation import AHEAD, completed
from benthic.evaluate.likelihood import Passage, likelihoods, windows
from benthic.evaluate.score import Score, ratio_score, share_score
from benthic.evaluate.tasks import MAX_BATCH, Progress
from benthic.inference.batching import BatchEngine
from benthic.inference.request import Sampling
from benthic.model import LanguageModel

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise MissingExtra("lm-eval", "eval") from missing

_SEED = 1234
"""Of sampled answers; what lm-eval's own clients send."""
_AS_IT_IS = "none"
"""lm-eval's name for answers that are not filtered."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What lm-eval asks of a model; ``lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), ...)``.

    Texts are read after the begin token, as Benthic's models are trained. Contexts that are too long lose their
    beginning, as in lm-eval's own models.

    Args:
        model: any.
        tokenizer: the one the model was trained with.
        progress: told of the course of each kind of request.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, progress: Progress = lambda *of: None) -> None:
        super().__init__()
        self._model, self._tokenizer, self._progress = model, tokenizer, progress
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins one."""
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after the begin token unless that is declined."""
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it would be written."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text."""
        passages: list[Passage] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            of_text = list(windows(self._tokenizer.encode(request.args[0]), self.prefix_token_id, self.max_length))
            passages += of_text
            owners += [number] * len(of_text)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, likelihoods(self._model, passages, self._report("texts")), strict=True):
            totals[owner] += found.logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, greedily unless the task asks for a temperature."""
        jobs = iter([self._job(*request.args) for request in requests])
        with BatchEngine(self._model, self._tokenizer, max_queue=AHEAD, max_batch=MAX_BATCH) as engine:
            return list(completed(engine, jobs, self._report("answers"), len(requests)))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        passages = [Passage(self._fitting(context, len(after) - 1), after) for _, context, after in requests]
        found = likelihoods(self._model, passages, self._report("likelihoods"))
        return [(one.logprob, one.greedy) for one in found]

    def _fitting(self, context: list[int], after: int) -> list[int]:
        """The end of a context that leaves room for so many tokens."""
        return context[-max(1, self.max_length - after) :]

    def _job(self, context: str, given: Mapping[str, Any]) -> tuple[list[int], Sampling]:
        given = dict(given)
        until = given.pop("until", ())
        sampled = given.pop("do_sample", False)
        longest = int(given.pop("max_gen_toks", 256))
        settings = {"temperature": 0.0, "top_p": 1.0, "seed": _SEED, **given}
        if not sampled:
            settings["temperature"] = 0.0
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        sampling = Sampling.checked(InferenceConfig(), settings | {"max_new_tokens": longest, "stop": stops})
        return self._fitting(self.tok_encode(context), longest), sampling

    def _report(self, work: str) -> Any:
        return lambda done, total: self._progress(work, done, total)


def harness(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], progress: Progress = lambda *of: None
) -> dict[str, Score]:
    """Scores of lm-eval's tasks: by task the first metric, each further one under ``TASK:METRIC``.

    Args:
        model: any.
        tokenizer: the one the model was trained with.
        tasks: names of lm-eval's, whose data come from the Hugging Face Hub, or YAML files of tasks.
        progress: told of the course of each kind of request.

    Raises:
        InputError: there is no such task, or it cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it says a line about every default of a task
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    try:
        loaded = manager.load(list(tasks))["tasks"]
    except Exception as error:  # of any kind: a task is read by many libraries, and may be code
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--lm-eval {' '.join(tasks)}: {why}") from error
    results = lm_eval.simple_evaluate(
        model=HarnessModel(model, tokenizer, progress), tasks=list(loaded.values()), task_manager=manager,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    return scores_of(results)


def scores_of(results: Mapping[str, Any]) -> dict[str, Score]:
    """Scores of the tasks in what ``simple_evaluate`` gives back, with intervals over their documents."""
    scores: dict[str, Score] = {}
    for task, found in results["results"].items():
        documents = results["samples"].get(task, [])
        for key, value in found.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if answer_filter == _AS_IT_IS else key
            own = [document[metric] for document in documents if document["filter"] == answer_filter]
            scores[f"{task}:{name}" if task in scores else task] = _score(name, float(value), own)
    return scores


def _score(metric: str, value: float, of_documents: Sequence[Any]) -> Score:
    """With the interval of the mean, or of the ratio of log-probability to length, that the value is.

    What is put together otherwise, such as F1, has none.
    """
    found = np.asarray(of_documents, dtype=np.float64)
    if found.ndim == 1:
        unit = bool(((found >= 0) & (found <= 1)).all())
        score = share_score(metric, found) if unit else ratio_score(metric, found, np.ones(len(found)))
    else:
        score = ratio_score(metric, -found[:, 0], found[:, 1])
        interval = None if score.ci95 is None else (_of_nats(metric, score.ci95[0]), _of_nats(metric, score.ci95[1]))
        score = replace(score, value=_of_nats(metric, score.value), ci95=interval)
    return score if math.isclose(score.value, value, rel_tol=1e-9) else Score(metric, value, len(found), None)


def _of_nats(metric: str, nats: float) -> float:
    """What a ratio of nats to length is in this metric: bits, or a perplexity."""
    with np.errstate(over="ignore"):
        return nats / math.log(2) if metric == "bits_per_byte" else float(np.exp(nats))
