"""The README's tour names the packages that exist and no others, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tour_matches_the_tree():
    tour = README.split("## A tour of the code")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/ ", tour, flags=re.MULTILINE))
    there = {path.parent.name for path in (ROOT / "benthic").glob("*/__init__.py")}
    assert named == there


def test_files_and_links_exist():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`(\w+/\w+\.py)`", README):
        assert (ROOT / "benthic" / path).is_file() or (ROOT / path).is_file(), path
