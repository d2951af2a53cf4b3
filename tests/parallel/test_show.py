"""`benthic timeline`: the same schedule as text, picture and numbers."""

import json

import pytest

from benthic.cli import app
from benthic.errors import InputError
from benthic.parallel.show import show


def test_a_schedule_is_shown_with_what_is_published():
    shown = show("dualpipev", 2, 4, "1,1,1")
    first, *rows = shown.text.splitlines()
    assert first == "dualpipev, 4 stages on 2 processes, 4 micro-batches: 7.69% idle, 7.69% published"
    assert [row.split(":")[0] for row in rows] == ["rank 0", "rank 1"]
    assert shown.svg.count("<rect") == 1 + 4 + sum(map(len, shown.figures["actions"].values()))
    assert shown.figures["actions"]["1"][0] == ["1F0", 1.0, 2.0]
    assert show("zbv", 2, 4, "1,1,1").figures["published_idle_share"] is None


@pytest.mark.parametrize("durations", ["1,1", "1,1,1,1", "a,b,c", "1,-1,1", "1,1,0", "1,nan,1", ""])
def test_durations_that_are_none_are_refused(durations):
    with pytest.raises(InputError, match="--times"):
        show("1f1b", 2, 2, durations)


def test_the_command_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "a.svg"
    app(["timeline", "1f1b", "--ranks", "2", "--svg", str(picture), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["idle_share"] == pytest.approx(1 / 9)
    assert picture.read_text().startswith("<svg")
