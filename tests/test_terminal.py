"""What is shown cannot command the terminal, and is else what was written."""

import pytest

from benthic.terminal import without_controls


@pytest.mark.parametrize("control", [*map(chr, {*range(32), *range(127, 160)} - {9, 10}), *"\u202a\u202e\u2066\u2069"])
def test_controls_are_dropped(control):
    assert without_controls(f"a{control}b") == "ab"


@pytest.mark.parametrize("text", ["tab\tline\n", "é ü ß", "שלום", "مرحبا", "👩\u200d👧 e\u0301", "क्\u200dष"])
def test_text_of_any_script_stays(text):
    assert without_controls(text) == text
