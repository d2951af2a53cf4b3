import random

import pytest

from benthic.inference.request import Token
from benthic.inference.text import TextStream


def streamed(tokenizer, ids, stops=()):
    """Tokens in the order they come out, and the stream."""
    stream, out = TextStream(tokenizer, stops), []
    for token in ids:
        out += stream.push(Token(token, "", float(token)))
        if stream.stopped:
            break
    return out + stream.finish(), stream


@pytest.mark.parametrize("seed", range(30))
def test_pieces_joined_are_the_text_up_to_the_stop_string_and_no_token_is_lost(tokenizer, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["🦑", "hello ", "st", "op", "é", "you ", "\n"]) for _ in range(12))
    ids = tokenizer.encode(text)
    stops = tuple(rng.sample(["stop", "op\n", "you h", "🦑é", "zzz"], rng.randint(0, 3)))
    out, stream = streamed(tokenizer, ids, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        first = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
        assert stream.text == text[: first[1]]
    else:
        assert stream.text == text
    assert "".join(token.text for token in out) == stream.text
    assert [token.id for token in out] == ids[: len(out)]
    assert [token.logprob for token in out] == [float(token.id) for token in out]
    assert stream.stopped == bool(ends)


def test_a_token_leaves_only_with_all_the_text_up_to_it(tokenizer):
    stream = TextStream(tokenizer, ["abcd"])
    *half, last = tokenizer.encode("🦑")
    assert half
    assert [stream.push(Token(token, "", 0.0)) for token in half] == [[] for _ in half]
    released = stream.push(Token(last, "", 0.0))
    assert [token.text for token in released] == ["", *[""] * (len(half) - 1), "🦑"]
    (a,), (b,), (x,) = map(tokenizer.encode, "abx")
    assert stream.push(Token(a, "", 0.0)) == stream.push(Token(b, "", 0.0)) == []
    assert [token.text for token in stream.push(Token(x, "", 0.0))] == ["", "", "abx"]


def test_what_waits_at_the_end_comes_with_its_tokens(tokenizer):
    ids = tokenizer.encode("ab🦑")[:-1]
    out, stream = streamed(tokenizer, ids, ["b🦑c"])
    assert [token.id for token in out] == ids
    assert stream.text == "ab"  # of a character that was broken off there is nothing
