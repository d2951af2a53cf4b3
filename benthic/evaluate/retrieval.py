"""Does a model find what stands far back? A fact is placed at some depth of a long text and asked for at its end.

Asked by likelihood, among colours, so that models can be scored that are too small to answer in words: by chance one in
eight is right. ("Needle in a haystack", Kamradt 2023; the V3 report has it in figure 8.)
"""

import random
from collections.abc import Sequence
from pathlib import Path

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.context_extension import TIMES
from benthic.evaluate.likelihood import Report
from benthic.evaluate.multiple_choice import multiple_choice
from benthic.evaluate.score import Score
from benthic.evaluate.task_files import ChoiceSettings, MultipleChoice, Task
from benthic.model import LanguageModel

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
THINGS = ("key", "door", "hat", "boat", "book", "lamp", "coat", "house", "bird", "flower")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the fact stands, from the text's beginning to just before the question."""


def retrieval_problems(
    tokenizer: Tokenizer, filler: str, *, length: int, count: int, seed: int = 0
) -> list[MultipleChoice]:
    """Problems whose texts fill ``length`` tokens but for less than a word or two, at each of ``DEPTHS`` in turn.

    Args:
        tokenizer: of the model that is to be asked.
        filler: plain text for the rest; it must fill a text.
        length: tokens of begin token, text, question and answer together.
        count: problems.
        seed: of facts and of where the filler is cut.

    Raises:
        InputError: the filler is too short for the length, or the length for the question.
    """
    rng = random.Random(seed)
    words = filler.split()
    sizes = [len(ids) for ids in tokenizer.encode_batch([f" {word}" for word in words])]
    return [
        _problem(tokenizer, words, sizes, length, DEPTHS[number % len(DEPTHS)], rng) for number in range(count)
    ]  # fmt: skip


def _problem(
    tokenizer: Tokenizer, words: Sequence[str], sizes: Sequence[int], length: int, depth: float, rng: random.Random
) -> MultipleChoice:
    thing, answer = rng.choice(THINGS), rng.randrange(len(COLOURS))
    question = f"The colour of the {thing} is"
    fact = f"{question} {COLOURS[answer]}."
    longest = max(len(ids) for ids in tokenizer.encode_batch([f" {colour}" for colour in COLOURS]))
    room = length - 1 - longest - len(tokenizer.encode(f" {fact} {question}"))
    if room < 0:
        raise InputError(f"length={length}: too short for a fact and a question about it")
    if sum(sizes) < 2 * room:
        raise InputError(f"filler: {sum(sizes)} tokens; a text of {length} needs {2 * room} to be cut from")
    start = _start(sizes, room, rng)
    end = start
    while end < len(words) and sum(sizes[start : end + 1]) <= room:
        end += 1
    cut = start + round(depth * (end - start))
    # Where words do not make up a text's tokens, as in some tokenizers, it is shortened until it fits.
    while True:
        text = " ".join([*words[start:cut], fact, *words[cut:end], question])
        if 1 + len(tokenizer.encode(text)) + longest <= length or end == start:
            break
        end -= 1
        cut = min(cut, end)
    return MultipleChoice(prompt=text, choices=tuple(f" {colour}" for colour in COLOURS), answer=answer)


def _start(sizes: Sequence[int], room: int, rng: random.Random) -> int:
    """A word from which on there are enough."""
    last, rest = len(sizes), 0
    while rest <= room and last > 0:
        last -= 1
        rest += sizes[last]
    return rng.randrange(last + 1)


def retrieval(
    model: LanguageModel, tokenizer: Tokenizer, filler: str, *, lengths: Sequence[int], count: int = 100, seed: int = 0,
    report: Report = lambda done, total: None,
) -> dict[int, Score]:  # fmt: skip
    """Share of facts that are found, by length of the text; arguments and errors as for :func:`retrieval_problems`.

    Lengths beyond ``max_position_embeddings`` want the model of :func:`~benthic.evaluate.context_extension.as_long`.
    """
    scores = {}
    for length in lengths:
        problems = retrieval_problems(tokenizer, filler, length=length, count=count, seed=seed)
        name = f"retrieval-{length}"
        task = Task(name, Path(name), ChoiceSettings(), tuple(problems), tuple(range(1, count + 1)))
        scores[length] = multiple_choice(model, tokenizer, task, report)[0]
    return scores


def lengths_from(pretrained_length: int) -> tuple[int, ...]:
    """The lengths at which context extension is checked: 1, 2 and 4 times that of pretraining."""
    return tuple(times * pretrained_length for times in (1, 2, TIMES))
