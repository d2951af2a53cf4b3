"""Bits per byte of documents from a task file, for any model: what it needs to write them down."""

import math

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.likelihood import Passage, Report, likelihoods, windows
from benthic.evaluate.score import Score, ratio_score
from benthic.evaluate.task_files import Task, Text
from benthic.model import LanguageModel


def bits_per_byte_of_texts(model: LanguageModel, tokenizer: Tokenizer, task: Task, report: Report) -> list[Score]:
    """Bits for a byte of all documents, each read by itself after the begin token; bytes are those of UTF-8.

    A document longer than the model takes is read in windows. Its end is not predicted, and no byte is charged for it.
    """
    texts = [problem.text for problem in task.problems if isinstance(problem, Text)]
    try:
        encoded = tokenizer.encode_batch(texts)
    except InputError as error:
        raise InputError(f"{task.path}: {error}") from None
    passages: list[Passage] = []
    owners: list[int] = []
    for number, ids in enumerate(encoded):
        of_text = list(windows(ids, tokenizer.bos_id, model.config.max_position_embeddings))
        passages += of_text
        owners += [number] * len(of_text)
    bits = [0.0] * len(texts)
    for owner, found in zip(owners, likelihoods(model, passages, report), strict=True):
        bits[owner] -= found.logprob / math.log(2)
    return [ratio_score("bits_per_byte", bits, [len(text.encode()) for text in texts])]
