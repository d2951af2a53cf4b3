"""Runs one program cut off from everything, in namespaces of its own; started by :mod:`benthic.posttrain.isolation`.

A script of the standard library alone, run by ``python -I``: four processes, each the parent of the next. The launcher
stays outside and says who is who inside; the builder enters new namespaces; the warden is process 1 of its own world,
in which nothing outlives it; the program is last and may do nothing but compute and write to its folder.

- User, network, IPC and process namespaces: no network interface, no foreign process, no way to send a signal out.
- A root directory of its own: Python and the system's libraries read-only, a folder ``/box`` in memory, nothing else.
  No socket file, no home, no ``/proc``.
- No capabilities and none to be had: the bounding set is empty and no further user namespaces can be made.
- Limits of time, memory, processes and file size.

A request (JSON) comes on standard input; on the descriptor it names goes one JSON object: ``{"refused": why}`` where
the kernel does not allow all of this, or ``{"exit": status}`` or ``{"timed_out": true}``. Nothing runs unisolated.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_ALL = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 24, 38
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
"""The number of this call is the same on every architecture."""
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_NOBODY = 65534
_PLACE = "/proc"
"""Where the new root is put together: a folder that every system has and that is needed no more."""

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel, or how it is set up, does not allow something."""


def main() -> None:
    """Read the request and see the program through."""
    _die_with_parent()
    request = json.load(sys.stdin)
    os.set_inheritable(request["report"], False)
    ready, mapped = os.pipe(), os.pipe()
    if builder := os.fork():
        os.close(ready[1])
        if os.read(ready[0], 1):
            _say_who_is_who(builder, request)
        os.close(mapped[1])
        os.waitpid(builder, 0)
        return
    os.close(mapped[1])
    _or_report(request, lambda: _build(request, ready[1], mapped[0]))


def _or_report(request: dict[str, Any], work: Callable[[], None]) -> NoReturn:
    """Do the work in this process and end it; what is not allowed is reported."""
    try:
        work()
    except (Refused, OSError) as error:
        _report(request, {"refused": str(error)})
    finally:
        os._exit(0)


def _report(request: dict[str, Any], content: dict[str, Any]) -> None:
    os.write(request["report"], json.dumps(content).encode())


def _say_who_is_who(builder: int, request: dict[str, Any]) -> None:
    """From outside: which users there are inside. Root alone may let a second one in, who owns nothing."""
    user, group = os.geteuid(), os.getegid()
    lines = (
        f"0 {user} 1\n{_NOBODY} {_NOBODY} 1\n" if user == 0 else f"0 {user} 1\n",
        (f"0 {group} 1\n{_NOBODY} {_NOBODY} 1\n" if user == 0 else f"0 {group} 1\n"),
    )
    try:
        for name, content in zip(("setgroups", "uid_map", "gid_map"), ("deny", *lines), strict=True):
            with open(f"/proc/{builder}/{name}", "w") as file:
                file.write(content)
    except OSError as error:
        _report(request, {"refused": f"users of a new namespace: {error.strerror}"})
        os.kill(builder, signal.SIGKILL)


def _build(request: dict[str, Any], ready: int, mapped: int) -> None:
    """Enter new namespaces, then start the warden in them."""
    outside = os.geteuid()
    _call("user and other namespaces", _libc.unshare, _ALL)
    os.write(ready, b"1")
    os.read(mapped, 1)
    _die_with_parent()
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    if warden := os.fork():
        os.waitpid(warden, 0)
        return
    _or_report(request, lambda: _guard(request, _NOBODY if outside == 0 else 0))


def _guard(request: dict[str, Any], user: int) -> None:
    """Make the root directory, start the program, and end it and all that came of it in time."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _enter_new_root(request)
    program = os.fork()
    if not program:
        _or_report(request, lambda: _become_program(request, user))
    deadline = time.monotonic() + request["seconds"]
    while time.monotonic() < deadline:
        ended, status = os.waitpid(-1, os.WNOHANG)  # orphans too
        if ended == program:
            _report(request, {"exit": os.waitstatus_to_exitcode(status)})
            return
        if not ended:
            time.sleep(0.002)
    _report(request, {"timed_out": True})
    # This process now ends, and with it, by the kernel's hand, all others of its namespace.


def _enter_new_root(request: dict[str, Any]) -> None:
    _mount("", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", _PLACE, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in request["readable"]:
        _show(path)
    for path in ("/box", "/dev"):
        os.makedirs(_PLACE + path, exist_ok=True)
    open(f"{_PLACE}/dev/null", "w").close()
    _mount("/dev/null", f"{_PLACE}/dev/null", "", _BIND)
    _mount("tmpfs", f"{_PLACE}/box", "tmpfs", _NOSUID | _NODEV, f"size={request['folder_bytes']},mode=777")
    with open(f"{_PLACE}/box/main.py", "w", encoding="utf-8") as file:
        file.write(request["program"])
    with open(f"{_PLACE}/box/input", "w", encoding="utf-8") as file:
        file.write(request["input"])
    os.chdir(_PLACE)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise Refused(f"a root directory of its own on {os.uname().machine}")
    _call("a root directory of its own", _libc.syscall, number, b".", b".")
    _call("leaving the old root directory", _libc.umount2, b".", _DETACH)
    os.chdir("/")
    _mount("", "/", "", _REMOUNT | _RDONLY | _NOSUID | _NODEV, "size=1m,mode=755")
    os.chdir("/box")


def _show(path: str) -> None:
    """A file, folder or link of the old root in the new one, read-only."""
    target = _PLACE + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "w").close()
    _mount(path, target, "", _BIND | _REC)
    attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    _call(
        f"{path} read-only", _libc.syscall, _MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE,
        ctypes.byref(attributes), ctypes.c_size_t(32),
    )  # fmt: skip


def _become_program(request: dict[str, Any], user: int) -> None:
    os.setsid()
    os.dup2(os.open("/box/input", os.O_RDONLY), 0)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    limits = {
        resource.RLIMIT_AS: request["memory_bytes"], resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_FSIZE: request["folder_bytes"], resource.RLIMIT_NPROC: request["processes"],
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_MEMLOCK: 0,
    }  # fmt: skip
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    _call("no new privileges", _libc.prctl, _NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0):
            break  # past the last one
    if user:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    environment = {"HOME": "/box", "TMPDIR": "/box", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    # What is left of capabilities goes here: a new program has those of the bounding set, which is empty.
    os.execve(request["python"], [request["python"], "-I", "-B", "main.py"], environment)  # noqa: S606


def _die_with_parent() -> None:
    _call("ending with its parent", _libc.prctl, _PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call(
        f"mounting {target}", _libc.mount, source.encode() or None, target.encode(), kind.encode() or None,
        ctypes.c_ulong(flags), data.encode() or None,
    )  # fmt: skip


def _call(what: str, function: Any, *arguments: Any) -> None:
    """A call of the C library; raises Refused if it fails."""
    if function(*arguments) < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
