"""Progress: few plain lines off a terminal, a bar on one."""

import io

from benthic.train.progress import PlainProgress, TerminalProgress, describe, left, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_rare_but_the_last_step_has_one():
    stream = io.StringIO()
    with open_progress("pretrain", 50, stream) as progress:
        assert isinstance(progress, PlainProgress)
        for step in range(1, 51):
            progress.update(step, "loss 1.0")
        progress.note("a note")
    assert stream.getvalue() == "pretrain 1/50  loss 1.0\npretrain 50/50  loss 1.0\na note\n"


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with open_progress("pretrain", 50, stream) as progress:
        assert isinstance(progress, TerminalProgress)
        progress.update(7, "loss [1.0]", 75)
        progress.note("note [bold]")
    assert "7/50" in stream.getvalue()
    assert "1:15 left" in stream.getvalue()
    assert "note [bold]" in stream.getvalue()


def test_figures_for_people():
    row = {"loss": 2.34567, "tokens_per_s": 4321.0, "share_of_gemm_peak": 0.555}
    assert describe(row, None) == "loss 2.346  4,321 tokens/s  56% of GEMM peak"
    assert "1.500 bits/byte" in describe(row, 1.5)
    assert [left(seconds) for seconds in (None, 75, 7322)] == ["", "  1:15 left", "  2:02:02 left"]
