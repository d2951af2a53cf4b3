"""Several task files on one model."""

from collections.abc import Callable, Sequence

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.generation import AHEAD, questions
from benthic.evaluate.multiple_choice import multiple_choice
from benthic.evaluate.score import Score
from benthic.evaluate.task_files import MultipleChoice, Question, Task
from benthic.evaluate.texts import bits_per_byte_of_texts
from benthic.inference.batching import BatchEngine
from benthic.model import LanguageModel

MAX_BATCH = 64
"""Answers that are written at once."""

Progress = Callable[[str, int, int | None], None]
"""Called with the task's name, how much is done, and of how much."""


def evaluate(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[Task], progress: Progress = lambda *of: None,
    *, cache_gib: float = 1.0,
) -> dict[str, Score]:  # fmt: skip
    """Scores by task: the first under the task's name, each further one under ``NAME:METRIC``.

    Args:
        model: any; in evaluation or training mode, which is one for these models.
        tokenizer: the one the model was trained with.
        tasks: from :func:`benthic.evaluate.task_files.read_tasks`.
        progress: told of the course of each task.
        cache_gib: memory of the engine's latent cache, in GiB.

    Raises:
        InputError: a problem does not fit the model.
        WorkFailed: the model's logits are not finite.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    scores: dict[str, Score] = {}
    for task in tasks:

        def report(done: int, total: int, name: str = task.name) -> None:
            progress(name, done, total)

        kind = type(task.problems[0])
        if kind is Question:
            with BatchEngine(model, tokenizer, max_queue=AHEAD, max_batch=MAX_BATCH, cache_gib=cache_gib) as engine:
                found = questions(engine, tokenizer, task, report)
        else:
            measure = multiple_choice if kind is MultipleChoice else bits_per_byte_of_texts
            found = measure(model, tokenizer, task, report)
        scores |= {f"{task.name}:{one.metric}" if number else task.name: one for number, one in enumerate(found)}
    return scores
