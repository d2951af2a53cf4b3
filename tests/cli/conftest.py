"""A small corpus and a small run for the tests of the command line."""

import pytest

PROSE = "The sea was calm and the lamp was low, and number {} of the old men told his tale again.\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text(PROSE.format(i) * 9, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_run(benthic, corpus, tmp_path_factory):
    """A run of a few steps; tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("runs") / "small"
    done = benthic("run", "tiny", "--out", out, "--set", f'data.sources=["{corpus}"]',
                   "--set", "data.validation_fraction=0.2", "--set", "train.steps=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out
