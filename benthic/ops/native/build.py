"""Compile the kernels once per machine, source and PyTorch, into the user's cache directory."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared",
    # Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
)  # fmt: skip


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line."""


def shared_library() -> Path:
    """Path of the compiled kernels, compiling them if no earlier process did."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found")
    target = _cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "benthic"


def _fingerprint(compiler: str) -> str:
    """Changes with anything that a compiled library depends on: source, flags, compiler, PyTorch, processor."""
    built_by = f"{compiler} {Path(compiler).stat().st_mtime_ns if Path(compiler).exists() else 0}"
    digest = hashlib.sha256(" ".join((built_by, torch.__version__, torch.__file__, _processor(), *_FLAGS)).encode())
    for source in sorted(_HERE.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's features where the system tells them: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(compiler: str, target: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [
                compiler, *_FLAGS, *map(str, sorted(_HERE.glob("*.cpp"))), "-o", str(built), f"-L{libraries}",
                "-ltorch_cpu", "-Wl,--no-undefined", f"-Wl,-rpath,{libraries}",
            ]  # fmt: skip
            result = subprocess.run(  # noqa: S603 - the user's own compiler
                command, capture_output=True, text=True, timeout=120, check=False
            )
            if result.returncode:
                complaint = next(
                    (line for line in result.stderr.splitlines() if "undefined" in line or "error" in line), "no reason"
                )
                raise BuildError(complaint.strip())
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
