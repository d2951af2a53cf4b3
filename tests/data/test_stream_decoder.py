"""Streaming shows exactly the text of all tokens, and never half a character."""

import codecs
import random

import pytest

from benthic.data.stream_decoder import StreamDecoder
from benthic.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["plain words and more words"], 270)


def pieces(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(index) for index in ids), decoder.finish()]


def test_split_characters_appear_whole(tokenizer):
    text = "words 😀👍🏽 and 你好 é\ufffd end " * 9
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the emoji really are split
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == text
    assert "".join(shown).count("\ufffd") == text.count("\ufffd")


def test_text_is_not_held_back(tokenizer):
    ids = tokenizer.encode("a plain line")
    assert all(piece == tokenizer.decode([index]) for index, piece in zip(ids, pieces(tokenizer, ids), strict=False))


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_join_to_their_decoding(tokenizer, seed):
    rng = random.Random(seed)
    ids = [rng.randrange(8, tokenizer.vocab_size) for _ in range(150)]
    for length in (149, 150):
        known = codecs.getincrementaldecoder("utf-8")("replace")
        expected = "".join(known.decode(tokenizer.token_bytes(index)) for index in ids[:length])
        assert "".join(pieces(tokenizer, ids[:length])) == expected


@pytest.mark.parametrize("text", ["x😀", "x\ufffd", "é\ufffd😀", "你", "é" * 40 + "😀"])
def test_an_unfinished_character_is_left_out_at_the_end(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == text
    for missing in range(1, len(text[-1].encode())):
        assert "".join(pieces(tokenizer, ids[:-missing])) == text[:-1]


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizer):
    *_, last = tokenizer.encode("😀")  # a byte that cannot begin one
    ids = tokenizer.encode("x")
    assert pieces(tokenizer, [*ids, last])[-1] == "\ufffd"
    assert "".join(pieces(tokenizer, [*ids, last, *tokenizer.encode("😀")[:-1]])) == "x\ufffd"
