"""Files that benthic writes can be read by whom the umask allows."""

import stat
import subprocess
import sys

import pytest

WRITE = """
import os, sys
from pathlib import Path
import torch
from benthic.convert.shards import write_shards
from benthic.train.checkpoint import Checkpoint, save

os.umask(int(sys.argv[2], 8))
out = Path(sys.argv[1])
save(out, 1, Checkpoint({"model": {"w": torch.ones(3)}}, {"step": 1}), keep=1)
write_shards(out, {"w": 12}, lambda name: torch.ones(3), 100, "export")
"""


@pytest.mark.parametrize(("umask", "mode"), [("022", 0o644), ("077", 0o600), ("002", 0o664)])
def test_weights_follow_the_umask(tmp_path, umask, mode):
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), umask], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*.*") if path.is_file()}
    assert modes.keys() >= {"model.safetensors", "state.json", "model-00001-of-00001.safetensors"}
    assert set(modes.values()) == {mode}
