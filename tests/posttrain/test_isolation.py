"""Programs that nobody has read: what they may do, and what hostile ones try in vain."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benthic.posttrain import isolation
from benthic.posttrain.isolation import CannotIsolate, Limits, run_isolated
from benthic.posttrain.rewards import code


@pytest.fixture(scope="module", autouse=True)
def possible():
    try:
        run_isolated("")
    except CannotIsolate as error:
        pytest.skip(str(error))


def test_a_program_computes_reads_and_writes_its_folder():
    ran = run_isolated(
        "import json, math, pathlib\n"
        "pathlib.Path('notes.txt').write_text('kept')\n"
        "print(int(input()) * 2, pathlib.Path('/box/notes.txt').read_text(), math.factorial(5))\n",
        "21\n",
    )
    assert (ran.outcome, ran.exit_status, ran.output) == ("ended", 0, "42 kept 120\n")


@pytest.mark.parametrize(
    ("program", "status"), [("exit(3)", 3), ("1/0", 1), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_how_it_ends_is_told(program, status):
    assert run_isolated(program).exit_status == status


def test_nothing_outside_its_folder_can_be_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("intact")
    places = [str(victim), str(tmp_path / "new"), "/tmp/new", "/var/tmp/new", "/dev/shm/new", "/usr/new", "/new",
              "/etc/new", "/dev/new", "/box/../new", "/proc/sys/kernel/hostname", sys.prefix + "/new"]  # fmt: skip
    ran = run_isolated(
        f"import os, shutil\nwritten = []\nfor place in {places!r}:\n"
        "    for act in (lambda: open(place, 'w').write('x'), lambda: os.makedirs(place + '.d'),\n"
        "                lambda: os.symlink('/', place + '.l'), lambda: os.chmod(place, 0o777),\n"
        "                lambda: os.unlink(place), lambda: os.utime(place)):\n"
        "        try:\n            act(); written.append(place)\n        except OSError: pass\n"
        "os.symlink('/usr', 'out')\n"
        "try:\n    open('out/x', 'w'); written.append('link')\nexcept OSError: pass\n"
        "print(written)"
    )
    assert ran.output == "[]\n"
    assert victim.read_text() == "intact"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_nothing_of_the_user_can_be_read(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("s3cret")
    monkeypatch.setenv("API_KEY", "s3cret")
    ran = run_isolated(
        f"import os\nprint(os.environ)\nfor path in ({str(tmp_path / 'secret')!r}, '/etc/passwd', '/proc/1/environ'):\n"
        "    try: print(open(path).read())\n    except OSError as error: print(type(error).__name__)\n"
    )
    assert "s3cret" not in ran.output
    assert ran.output.count("FileNotFoundError") == 3


def test_the_network_cannot_be_reached(tmp_path):
    path = tmp_path / "socket"
    with (
        socket.create_server(("127.0.0.1", 0)) as inet,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(str(path))
        abstract.bind("\0benthic-test-isolation")
        for server in (inet, unix, abstract):
            server.listen()
            server.setblocking(False)
        targets = [("INET", ("127.0.0.1", inet.getsockname()[1])), ("INET", ("1.1.1.1", 53)), ("UNIX", str(path)),
                   ("UNIX", "\0benthic-test-isolation")]  # fmt: skip
        ran = run_isolated(
            f"import socket\nfor kind, target in {targets!r}:\n    try:\n"
            "        with socket.socket(getattr(socket, 'AF_' + kind)) as s:\n"
            "            s.settimeout(1); s.connect(target); print('reached', target)\n"
            "    except OSError: print('no')\n"
            "try: socket.getaddrinfo('example.com', 80); print('resolved')\nexcept OSError: print('no')\n"
        )
        assert ran.output == "no\n" * 5
        for server in (inet, unix, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()


def _alive(marker):
    def command(process):
        try:
            return (process / "cmdline").read_bytes()
        except OSError:
            return b""

    return any(marker.encode() in command(process) for process in Path("/proc").glob("[0-9]*"))


_DAEMON = """
import os, signal, subprocess, sys, time
for number in range(1, 65):
    if number not in (9, 19, 32, 33): signal.signal(number, signal.SIG_IGN)
for _ in range(3):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", MARKER], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    subprocess.call([sys.executable, "-c", "import time; time.sleep(600)", MARKER])
time.sleep(0.3)
print("started", flush=True)
"""


@pytest.mark.parametrize("end", ["", "while True: pass", "import time; time.sleep(600)"])
def test_nothing_outlives_it_and_it_not_its_limit(end):
    marker = f"benthic-marker-{os.getpid()}-{len(end)}"
    seconds = 8 if end else 30  # a busy machine takes its time to start five interpreters
    start = time.monotonic()
    ran = run_isolated(_DAEMON.replace("MARKER", repr(marker)) + end, limits=Limits(seconds=seconds))
    assert ran.output == "started\n"
    assert ran.outcome == ("timed out" if end else "ended")
    assert time.monotonic() - start < seconds + isolation._GRACE_S
    deadline = time.monotonic() + 5
    while _alive(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(marker)


def test_it_ends_with_the_process_that_asked_for_it():
    marker = f"benthic-orphan-{os.getpid()}"
    program = (
        f"import subprocess, sys; subprocess.call([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])"
    )
    asks = f"from benthic.posttrain.isolation import *; run_isolated({program!r}, limits=Limits(seconds=300))"
    with subprocess.Popen([sys.executable, "-c", asks]) as asking:
        deadline = time.monotonic() + 30
        # The asking process has the marker in its own command line.
        while not _alive_below(marker, asking.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _alive_below(marker, asking.pid)
        asking.kill()
    deadline = time.monotonic() + 10
    while _alive(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(marker)


def _alive_below(marker, but):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != but and marker.encode() in (process / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def test_signals_do_not_get_out():
    ran = run_isolated(
        f"import os, signal\nfor pid in ({os.getpid()}, {os.getppid()}):\n"
        "    try: os.kill(pid, signal.SIGTERM); print('sent')\n    except ProcessLookupError: print('nobody')\n"
    )
    assert ran.output == "nobody\n" * 2


def test_memory_processes_files_and_output_are_limited():
    small = Limits(seconds=5, memory_mib=256, folder_mib=1, output_bytes=1000)
    assert run_isolated("bytearray(1 << 30)", limits=small).exit_status == 1
    count = run_isolated(
        "import os, time\nmade = 0\ntry:\n    for _ in range(1000):\n        if os.fork() == 0: time.sleep(9)\n"
        "        made += 1\nexcept OSError: print(made)", limits=small,
    )  # fmt: skip
    assert 0 < int(count.output) <= small.processes
    assert run_isolated("for n in range(9): open(str(n), 'wb').write(bytes(1 << 19))", limits=small).exit_status == 1
    flood = run_isolated("while True: print('x' * 100)", limits=small)
    assert (flood.outcome, len(flood.output)) == ("too much output", 1000)


def test_no_capabilities_and_none_to_be_had():
    ran = run_isolated(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'tmpfs', b'/box', b'tmpfs', 0, None),\n"
        "      libc.mount(None, b'/usr', None, 32 | 4096, None), libc.chroot(b'/box'),\n"
        "      libc.ptrace(16, 1, None, None), libc.umount2(b'/usr', 2))"
    )
    assert ran.output == "-1 -1 -1 -1 -1 -1\n"


def test_where_the_kernel_refuses_nothing_is_run(monkeypatch, tmp_path):
    refusing = tmp_path / "launcher.py"
    text = isolation._LAUNCHER.read_text()
    refusing.write_text(text.replace("_libc = ctypes.CDLL(None, use_errno=True)", _WITHOUT_UNSHARE))
    assert refusing.read_text() != text
    monkeypatch.setattr(isolation, "_LAUNCHER", refusing)
    with pytest.raises(CannotIsolate, match="does not allow what keeps them apart"):
        run_isolated("print('ran')")


_WITHOUT_UNSHARE = """
class _Libc:
    real = ctypes.CDLL(None, use_errno=True)
    def __getattr__(self, name):
        return getattr(self.real, name)
    def unshare(self, flags):
        return -1
_libc = _Libc()
"""


def test_other_systems_are_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CannotIsolate, match="Linux"):
        run_isolated("print('ran')")


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("```python\nprint(int(input()) + 1)\n```", 1),
        ("<think>```python\nprint(0)\n```</think>\n```python\nprint(int(input()) + 1)\n```", 1),
        ("```python\nprint(2)\n```", 0.5),
        ("print(int(input()) + 1)", 0),
        ("```python\nprint(int(input()) + 1); exit(1)\n```", 0),
        ("```python\nwhile True: pass\n```", 0),
        ("```python\nopen('main.py').read(); print('1 1')\n```", 0),
    ],
)
def test_code_is_worth_the_tests_it_passes(answer, share):
    tests = [{"stdin": "1", "stdout": "2"}, {"stdin": "-4", "stdout": "-3\n"}]
    problem = {"tests": tests, "limits": {"seconds": 1.0 if "while" in answer else 30.0}}
    assert code("", answer, problem) == share


def test_a_function_is_called_by_what_is_put_after_it():
    problem = {"tests": [{"append": "print(solve(3))", "stdout": "9"}]}
    assert code("", "```python\ndef solve(x):\n    return x * x\n```", problem) == 1
