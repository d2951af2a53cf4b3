"""Log-probabilities of plain texts: each token has its place in the text, also where a character is several tokens."""

import random

import pytest

from benthic.data.tokenizer import Tokenizer
from benthic.inference.request import Token
from benthic.serve.answers import TextLogprobs


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["plain words and more words"], 275)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_offsets_are_characters_of_the_text(tokenizer, seed, streamed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["words ", "é", "🙂", "你", "x", "\ufffd"]) for _ in range(40))
    ids = tokenizer.encode(text)
    raw = [tokenizer.token_bytes(index) for index in ids]
    assert b"".join(raw) == text.encode()
    place, expected = {}, []
    for number, character in enumerate(text):
        place |= dict.fromkeys(range(len(place), len(place) + len(character.encode())), number)
    for number in range(len(ids)):
        expected.append(place[len(b"".join(raw[:number]))])
    columns, tokens = TextLogprobs(tokenizer), [Token(index, "", -1.0) for index in ids]
    parts = [[token] for token in tokens] if streamed else [tokens]
    assert [offset for part in parts for offset in columns.of(part)["text_offset"]] == expected


def test_bytes_that_are_no_character_count_once(tokenizer):
    *_, wrong = tokenizer.encode("🙂")
    (x,) = tokenizer.encode("x")
    ids = [x, wrong, x, x]
    assert tokenizer.decode(ids) == "x\ufffdxx"
    assert TextLogprobs(tokenizer).of([Token(index, "", -1.0) for index in ids])["text_offset"] == [0, 1, 2, 3]
    assert TextLogprobs(tokenizer).of([Token(tokenizer.bos_id, "", -1.0), *[Token(x, "", -1.0)] * 2])[
        "text_offset"
    ] == [0, 0, 1]
