"""Multiple choice by likelihood: the choice that the model finds likeliest after the prompt is its answer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.likelihood import Passage, Report, likelihoods, split
from benthic.evaluate.prompts import chat_ids, fits
from benthic.evaluate.score import Score, share_score
from benthic.evaluate.task_files import ChoiceSettings, MultipleChoice, Task
from benthic.model import LanguageModel

Lengths = npt.NDArray[np.float64]


def multiple_choice(model: LanguageModel, tokenizer: Tokenizer, task: Task, report: Report) -> list[Score]:
    """Share of problems answered rightly, by three rules.

    ``accuracy`` compares the choices' log-probabilities, ``accuracy_per_byte`` and ``accuracy_per_character`` those
    divided by the choice's length, which a long choice needs against short ones. Of equals, the first counts.

    Raises:
        InputError: a problem is too long for the model, or needs a chat template that it lacks.
    """
    assert isinstance(task.settings, ChoiceSettings)
    problems = [problem for problem in task.problems if isinstance(problem, MultipleChoice)]
    passages: list[Passage] = []
    for index, problem in enumerate(problems):
        of_problem = _passages(tokenizer, problem, task.settings.chat, task.where(index))
        for context, continuation in of_problem:
            fits(len(context) + len(continuation) - 1, model.config.max_position_embeddings, task.where(index))
        passages += of_problem
    logprobs = iter([one.logprob for one in likelihoods(model, passages, report)])
    by_problem = [np.array([next(logprobs) for _ in problem.choices]) for problem in problems]
    return [share_score(metric, right) for metric, right in judged(problems, by_problem).items()]


def judged(problems: Sequence[MultipleChoice], logprobs: Sequence[Lengths]) -> dict[str, list[bool]]:
    """Whether each problem was answered rightly, by each rule, from the log-probabilities of its choices."""
    lengths = {
        "accuracy": lambda choice: 1,
        "accuracy_per_byte": lambda choice: len(choice.encode()),
        "accuracy_per_character": len,
    }
    return {
        metric: [
            int((given / np.array([length(choice) for choice in problem.choices])).argmax()) == problem.answer
            for problem, given in zip(problems, logprobs, strict=True)
        ]
        for metric, length in lengths.items()
    }


def _passages(tokenizer: Tokenizer, problem: MultipleChoice, chat: bool, where: str) -> list[Passage]:
    try:
        conversation = chat_ids(tokenizer, problem, chat)
        if conversation is not None:
            return [Passage(conversation, ids) for ids in tokenizer.encode_batch(problem.choices)]
        pairs = [split(tokenizer, problem.prompt or "", choice) for choice in problem.choices]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return [Passage([tokenizer.bos_id, *context], continuation) for context, continuation in pairs]
