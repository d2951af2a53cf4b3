"""Commands that use a model begin soon: what takes seconds to import, and is for others, is not imported."""

import json
import subprocess
import sys

import pytest

SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy")
PROGRAM = f"""
import sys, json
from benthic.cli import main
try:
    main()
finally:
    print(json.dumps([name for name in {SLOW} if name in sys.modules]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [("generate", "--prompt", "The sea"), ("eval",)], ids=["generate", "eval"])
def test_a_model_is_used_without_pytorch_s_compiler_and_what_divides_models(small_run, command):
    name, *options = command
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(small_run), *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, json.loads(done.stderr.splitlines()[-1])) == (0, [])
