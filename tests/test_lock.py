"""One process at a time on a directory, and nothing left of the lock however its holder ends."""

import os
import signal
import subprocess
import sys

import pytest

from benthic.errors import InputError
from benthic.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from benthic.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a directory."""
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield out, process
        process.kill()


def test_another_process_is_refused_with_the_holders_number(holder):
    out, process = holder
    with pytest.raises(InputError, match=rf"{out}: in use by process {process.pid}"), locked(out):
        pass


def test_a_kill_frees_the_directory(holder):
    out, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / ".lock").exists()
    with locked(out):
        assert (out / ".lock").read_text() == f"{os.getpid()}\n"
    assert not out.exists()


def test_a_directory_with_something_in_it_stays_and_can_be_held_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "a" / "out"):
            (tmp_path / "a" / "out" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "out").iterdir()] == ["file"]


def test_a_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"), locked(tmp_path / "file"):
        pass
