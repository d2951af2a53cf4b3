import random

import pytest

from benthic.inference.stopping import StopScanner


def released(stops, pieces):
    scanner = StopScanner(stops)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + scanner.finish(), scanner.stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected", "stopped"),
    [
        ([], "no stops at all", "no stops at all", False),
        (["END"], "before END after", "before ", True),
        (["END"], "before EN", "before EN", False),
        (["aab"], "aaaab", "aa", True),
        (["abc", "b"], "xabc", "xa", True),
        (["abc", "bc"], "xabc", "x", True),
        (["\n\n", "\n\n\n"], "one\ntwo\n\n\nthree", "one\ntwo", True),
        (["🙂"], "well 🙂 yes", "well ", True),
    ],
)
def test_cuts_the_same_however_the_text_is_split(stops, text, expected, stopped):
    assert released(stops, [text]) == (expected, stopped)
    assert released(stops, text) == (expected, stopped)
    for seed in range(20):
        cuts = sorted(random.Random(seed).sample(range(len(text) + 1), 3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert released(stops, pieces) == (expected, stopped)


def test_releases_text_as_soon_as_it_is_safe():
    scanner = StopScanner(["END"])
    assert [scanner.push(piece) for piece in ("a", "bE", "N", "Ex", "E")] == ["a", "b", "", "ENEx", ""]
    assert scanner.finish() == "E"


def test_nothing_follows_a_stop():
    scanner = StopScanner(["."])
    assert scanner.push("one. two") == "one"
    assert scanner.push("three") == ""
    assert scanner.finish() == ""
