"""Runs the command line as a user does, in this process: its exit status and both of its outputs."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

import pytest

from benthic.cli import main

PROSE = "The sea was calm and the lamp was low, and number {} of the old men told his tale again.\n"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def benthic():
    def invoke(*arguments, stdin=""):
        out, err = io.StringIO(), io.StringIO()
        argv = ["benthic", *map(str, arguments)]
        with (
            mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop,
        ):  # fmt: skip
            main()
        return Done(stop.value.code or 0, out.getvalue(), err.getvalue())

    return invoke


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
