"""As a process: help comes at once and shows an example, and a mistake leaves no traceback."""

import re
import resource
import subprocess
import sys

import pytest
import typer

from benthic.cli import app

COMMANDS = ["run", "data", "train", "sft", "distil", "eval", "chat", "generate", "serve", "import", "export",
            "report", "plan", "timeline", "bench stages", "bench train", "bench prefill", "bench decode"]  # fmt: skip
PROGRAM = [sys.executable, "-c", "from benthic.cli import main; main()"]


def cpu_seconds(command):
    """Processor time of a process: what it takes on an idle machine, measured on one that may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_within_half_a_second(command):
    for _ in range(10):  # a virtual machine's processor time also has slow moments
        seconds, text = cpu_seconds([*PROGRAM, *command.split(), "--help"])
        if seconds < 0.5:
            break
    assert seconds < 0.5
    assert re.search(f"(Example|Begin with): benthic {command}", text)


def with_subcommands(command):
    return [command, *(one for sub in getattr(command, "commands", {}).values() for one in with_subcommands(sub))]


def test_no_help_has_what_would_be_taken_for_markup():
    """What stands in brackets would not be shown."""
    commands = with_subcommands(typer.main.get_command(app))
    helps = [command.help for command in commands]
    helps += [parameter.help for command in commands for parameter in command.params]
    assert len(helps) > 100
    assert [text for text in helps if re.search(r"\[/?[a-z]", text or "")] == []


def test_a_mistake_leaves_no_traceback():
    done = subprocess.run([*PROGRAM, "plan", "v3-671"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_importing_benthic_does_not_import_torch():
    code = "import sys, benthic, benthic.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    import benthic

    assert set(dir(benthic)) == {"Engine", "Tokenizer", "__version__", "load", "plan", "train"}
    assert all(getattr(benthic, name) for name in dir(benthic))
    with pytest.raises(AttributeError, match="nothing_else"):
        _ = benthic.nothing_else
