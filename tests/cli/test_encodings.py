"""Terminals and pipes that are not UTF-8: text is escaped where it must be, and nothing ends in a traceback."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = "from benthic.cli import main; main()"
WRITE = ("--set", "inference.max_new_tokens=40", "--set", "inference.seed=1")


def generate(run, encoding, *arguments):
    command = [sys.executable, "-c", PROGRAM, "generate", str(run), *arguments]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, env=environment, check=False)


@pytest.fixture(scope="module")
def expected(small_run):
    """What is written to a terminal that takes everything: as text, and as JSON."""
    done = [generate(small_run, "utf-8", "--prompt", "The sea", *more, *WRITE) for more in ([], ["--json"])]
    assert [(each.returncode, each.stderr) for each in done] == [(0, b""), (0, b"")]
    text, found = (each.stdout.decode() for each in done)
    # An untrained model writes all sorts of bytes, which become U+FFFD.
    assert not text.isascii()
    return text, json.loads(found)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_text_can_be_written(small_run, expected, encoding):
    done = generate(small_run, encoding, "--prompt", "The sea", *WRITE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == expected[0].encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_is_json_in_any_encoding(small_run, expected, encoding):
    done = generate(small_run, encoding, "--prompt", "The sea", "--json", *WRITE)
    found = json.loads(done.stdout.decode(encoding))
    assert found.keys() == expected[1].keys()
    # Clocks differ, and so does how far drafts go, which is decided by them.
    assert all(found[key] == expected[1][key] for key in ("text", "token_ids", "logprobs", "finish_reason"))


def test_a_prompt_that_is_no_text(small_run):
    done = generate(small_run, "utf-8", "--prompt", b"a\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: text that is not UTF-8")
