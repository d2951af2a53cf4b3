"""Compile the kernels once per machine, source and PyTorch, into the user's cache directory."""

import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_DAY = 86400.0
_UNFINISHED = "building-"
_TORCH = Path(torch.__file__).parent
_TORCH_LIBRARIES = f"-L{_TORCH / 'lib'}", f"-Wl,-rpath,{_TORCH / 'lib'}", "-Wl,--no-undefined"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class _Library:
    """C++ files of a folder that make a library, and what the compiler is told beyond ``_FLAGS``."""

    folder: Path
    flags: tuple[str, ...]
    links: tuple[str, ...]


_LIBRARIES = {
    "kernels": _Library(
        _HERE,
        # Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
        ("-fopenmp", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
        ("-ltorch_cpu", *_TORCH_LIBRARIES),
    ),
    # Sums stay in order, so that they are the same wherever a product is inlined.
    "decode": _Library(_HERE / "decode", ("-ffp-contract=off", "-pthread"), ("-ldl",)),
    # Here neither sums nor quotients may be anything but what is written, for results are exact.
    "fp8": _Library(_HERE / "fp8", ("-ffp-contract=off", "-fopenmp"), ("-ltorch_cpu", *_TORCH_LIBRARIES)),
    "memory": _Library(_HERE / "memory", (f"-I{_TORCH / 'include'}",), ("-lc10", *_TORCH_LIBRARIES)),
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line."""


def shared_library(name: str = "kernels") -> Path:
    """Path of a compiled library of ``_LIBRARIES``, compiling it if no earlier process did.

    Raises BuildError if that fails, or failed within the last day: else every process would try for itself.
    """
    compiler = _compiler()
    library = _LIBRARIES[name]
    target = _cache_directory() / f"{name}-{_fingerprint(compiler, library)}.so"
    failure = target.with_suffix(".failed")
    if target.exists():
        with suppress(OSError):
            target.touch()  # in use, so not to be removed as old
        return target
    if _age(failure) < _DAY:
        raise BuildError(failure.read_text(encoding="utf-8"))
    try:
        _compile(compiler, library, target)
    except BuildError as error:
        with suppress(OSError):
            failure.write_text(str(error), encoding="utf-8")
        raise
    return target


def _compiler() -> list[str]:
    """The command that compiles: ``$CXX``, which may be of several words, else GCC, which brings OpenMP along."""
    if given := shlex.split(os.environ.get("CXX", "")):
        return given
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found")


def _cache_directory() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "benthic"
    try:
        return Path.home() / ".cache" / "benthic"
    except RuntimeError as error:
        raise BuildError("no home directory to keep them in; set XDG_CACHE_HOME") from error


def _age(path: Path) -> float:
    """Seconds since a file or folder was changed; infinite if it is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


def _fingerprint(compiler: list[str], library: _Library) -> str:
    """Changes with anything that a compiled library depends on: source, flags, compiler, PyTorch, processor."""
    programs = [Path(path) for word in compiler if (path := shutil.which(word))]
    built_by = f"{compiler} {[path.stat().st_mtime_ns for path in programs]}"
    told = (built_by, torch.__version__, torch.__file__, _processor(), *_FLAGS, *library.flags, *library.links)
    digest = hashlib.sha256(" ".join(told).encode())
    for source in sorted({*library.folder.glob("*.cpp"), *_HERE.rglob("*.h")}):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's features where the system tells them: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(compiler: list[str], library: _Library, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as folder:
            built = Path(folder) / target.name
            command = [
                *compiler, *_FLAGS, *library.flags, *map(str, sorted(library.folder.glob("*.cpp"))), "-o", str(built),
                *library.links,
            ]  # fmt: skip
            result = subprocess.run(  # noqa: S603 - the user's own compiler
                command, capture_output=True, text=True, timeout=600, check=False
            )
            if result.returncode:
                complaint = next(
                    (line for line in result.stderr.splitlines() if "undefined" in line or "error" in line), "no reason"
                )
                raise BuildError(complaint.strip())
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error


def _remove_old(directory: Path) -> None:
    """Delete what killed builds left behind, and what no process has used for a month."""
    for folder in directory.glob(f"{_UNFINISHED}*"):
        if _age(folder) > _DAY:
            shutil.rmtree(folder, ignore_errors=True)
    for name in _LIBRARIES:
        for file in directory.glob(f"{name}-*"):
            if _age(file) > 30 * _DAY:
                file.unlink(missing_ok=True)
