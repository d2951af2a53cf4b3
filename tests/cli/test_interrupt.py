"""Ctrl-C outside training: one line, exit status 130, and nothing half written."""

import signal
import subprocess
import sys
import time

PROGRAM = "from benthic.cli import main; main()"


def test_ctrl_c_while_data_is_prepared(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, "data", "stdlib", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out / ".lock").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.splitlines()[-1]) == (130, "", "stopped by Ctrl-C")
    assert "Traceback" not in stderr
    assert not out.exists()
