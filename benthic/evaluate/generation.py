"""Questions that a model answers in writing: sampled through the batching engine, judged by verifiers, pass@k."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.evaluate import match
from benthic.evaluate.likelihood import Report
from benthic.evaluate.prompts import fits, prompt_ids
from benthic.evaluate.score import Score, share_score
from benthic.evaluate.scorer import Scorer
from benthic.evaluate.task_files import Question, QuestionSettings, Task
from benthic.inference.batching import BatchEngine
from benthic.inference.request import Request, Sampling

AHEAD = 256
"""Requests that wait in the engine besides those it works on."""


@dataclass(frozen=True)
class Answer:
    """One sample, and what the verifier made of it."""

    text: str
    score: float
    """1 is right; some of reasoning-gym's scorers give a part for what is nearly so."""


def questions(engine: BatchEngine, tokenizer: Tokenizer, task: Task, report: Report) -> list[Score]:
    """Share of right answers; arguments and errors as for :func:`answers`, scores as of :func:`scores`."""
    return scores(task, answers(engine, tokenizer, task, report))


def answers(engine: BatchEngine, tokenizer: Tokenizer, task: Task, report: Report) -> list[list[Answer]]:
    """The samples of each question. Equal settings and seeds give equal answers, whatever else the engine does.

    Raises:
        InputError: a prompt leaves no room for an answer, or needs a chat template that the model lacks.
        WorkFailed: the engine has failed.
    """
    settings = task.settings
    assert isinstance(settings, QuestionSettings)
    asked = [problem for problem in task.problems if isinstance(problem, Question)]
    prompts = [_ids(tokenizer, problem, task, index) for index, problem in enumerate(asked)]
    for index, prompt in enumerate(prompts):
        fits(len(prompt), engine.config.max_position_embeddings - 1, task.where(index))
    jobs = (
        (prompt, _sampling(settings, index, sample))
        for index, prompt in enumerate(prompts)
        for sample in range(settings.samples)
    )
    texts = completed(engine, jobs, report, len(prompts) * settings.samples)
    with Scorer() as scorer:
        return [
            [judge(problem, next(texts), settings, scorer) for _ in range(settings.samples)] for problem in asked
        ]  # fmt: skip


def completed(
    engine: BatchEngine, jobs: Iterator[tuple[Sequence[int], Sampling]], report: Report, total: int
) -> Iterator[str]:
    """The text of each job in order; no more than the engine can do with are handed to it ahead of time."""
    pending: list[Request] = []
    try:
        for done in itertools.count(1):
            for prompt, sampling in itertools.islice(jobs, max(0, AHEAD - len(pending))):
                pending.append(engine.submit(prompt, sampling))
            if not pending:
                return
            outcome = pending.pop(0).wait()
            if outcome.finish_reason == "error":
                raise WorkFailed(outcome.error or "the engine has failed")
            report(done, total)
            yield outcome.text
    finally:
        for request in pending:
            request.cancel()


def judge(question: Question, text: str, settings: QuestionSettings, scorer: Scorer) -> Answer:
    """An answer's score: of what is left without a reasoning section, and after extraction where that is asked for."""
    said: str | None = match.after_reasoning(text).strip()
    if settings.extract is not None:
        said = match.extracted(said or "", settings.extract)
    if said is None:
        return Answer(text, 0.0)
    if question.family is not None:
        assert question.entry is not None
        return Answer(text, scorer.score(question.family, said, question.entry))
    if question.verifier == "numeric":
        return Answer(text, float(match.numeric(said, question.answer, tolerance=settings.tolerance)))
    return Answer(text, float(match.VERIFIERS[question.verifier](said, question.answer)))


def scores(task: Task, given: Sequence[Sequence[Answer]]) -> list[Score]:
    """``accuracy`` of single answers, or ``pass@k`` of several; and of reasoning-gym's scorers the mean ``score``."""
    settings = task.settings
    assert isinstance(settings, QuestionSettings)
    right = [sum(answer.score >= 1 for answer in samples) for samples in given]
    if settings.samples == 1:
        found = [share_score("accuracy", right)]
    else:
        found = [
            share_score(f"pass@{k}", [pass_at_k(settings.samples, correct, k) for correct in right])
            for k in settings.pass_at or (1, settings.samples)
        ]
    if any(isinstance(problem, Question) and problem.family for problem in task.problems):
        found.append(share_score("score", [float(np.mean([answer.score for answer in one])) for one in given]))
    return found


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of ``k`` samples, drawn of these without replacement, is right: without bias.

    Source: arXiv 2107.03374, section 2.1, equation 1, in its numerically stable form.
    """
    if samples - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


def _ids(tokenizer: Tokenizer, problem: Question, task: Task, index: int) -> list[int]:
    assert isinstance(task.settings, QuestionSettings)
    try:
        return prompt_ids(tokenizer, problem, task.settings.chat)
    except InputError as error:
        raise InputError(f"{task.where(index)}: {error}") from None


def _sampling(settings: QuestionSettings, index: int, sample: int) -> Sampling:
    """Settings of one sample; its seed is its own."""
    digest = hashlib.blake2b(f"{settings.seed} {index} {sample}".encode(), digest_size=8).digest()
    return Sampling(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p,
        stop=settings.stop, seed=int.from_bytes(digest, "big") >> 1,
    )  # fmt: skip
