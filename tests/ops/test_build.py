"""The kernels' cache: one build, one failure told to all, nothing old left; the compiler here is a small script."""

import os
import time
from pathlib import Path

import pytest

from benthic.ops.native import build

PROGRAM = """#!/bin/sh
echo "$@" >> {log}
{act}
while [ "$1" != "-o" ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a compiler in $CXX; returns its calls, one a line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "log"
    log.touch()

    def install(act="", words=""):
        program = tmp_path / "cxx"
        program.write_text(PROGRAM.format(log=log, act=act))
        program.chmod(0o755)
        monkeypatch.setenv("CXX", f"{program}{words}")
        return lambda: log.read_text().splitlines()

    return install


def age(path, days):
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_compiles_once(compiler):
    calls = compiler()
    first = build.shared_library()
    assert build.shared_library() == first
    assert first.read_text() == "library\n"
    assert len(calls()) == 1


def test_a_compiler_of_several_words(compiler):
    calls = compiler(words=" g++ -pipe")
    build.shared_library()
    assert calls()[0].startswith("g++ -pipe -std=c++17")


def test_a_failure_is_kept_with_its_reason_for_a_day(compiler):
    calls = compiler(act="echo 'x.cpp:1: error: no omp.h' >&2; exit 1")
    for _ in range(3):
        with pytest.raises(build.BuildError, match=r"error: no omp\.h"):
            build.shared_library()
    assert len(calls()) == 1
    (failure,) = build._cache_directory().glob("kernels-*.failed")
    age(failure, 2)
    with pytest.raises(build.BuildError, match="no omp"):
        build.shared_library()
    assert len(calls()) == 2


def test_a_build_removes_what_is_old(compiler):
    compiler()
    cache = build._cache_directory()
    cache.mkdir(parents=True)
    files = {name: cache / name for name in ("kernels-0.so", "kernels-1.so", "kernels-2.failed", "mine.so")}
    folders = {name: cache / name for name in ("building-0", "building-1")}
    for path in files.values():
        path.touch()
    for path in folders.values():
        path.mkdir()
    for name in ("kernels-0.so", "kernels-2.failed", "mine.so"):
        age(files[name], 31)
    age(folders["building-0"], 2)
    library = build.shared_library()
    assert {path.name for path in cache.iterdir()} == {"kernels-1.so", "mine.so", "building-1", library.name}


def test_using_a_library_keeps_it_young(compiler):
    compiler()
    library = build.shared_library()
    age(library, 40)
    build.shared_library()
    assert time.time() - library.stat().st_mtime < 60


def test_without_a_home_there_is_a_reason(compiler, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    compiler()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build.shared_library()


def test_gcc_goes_before_other_compilers(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}")
    assert build._compiler() == ["/bin/g++"]
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="no C"):
        build._compiler()
