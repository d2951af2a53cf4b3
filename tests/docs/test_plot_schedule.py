"""The drawing of the published course shows what the report says, and is the same file every time."""

import importlib.util
from pathlib import Path

import pytest

from benthic.config.load import load_run_config

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("plot_schedule", DOCS / "plot_schedule.py")
plot_schedule = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plot_schedule)


def test_the_curves_begin_turn_and_end_as_published():
    curves = plot_schedule.curves(load_run_config("v3-671b"))
    tokens = curves.pop("trillion tokens")
    assert tokens[0] == 0
    # 14.8T tokens, then twice 1000 steps of 62.9M.
    assert tokens[-1] == pytest.approx(14.8 + 2 * 0.0629, abs=1e-3)
    assert tokens == sorted(tokens)

    def at(moment: float) -> tuple[float, ...]:
        last = max(place for place, read in enumerate(tokens) if read <= moment)
        return tuple(values[last] for values in curves.values())

    assert at(5) == (2.2e-4, 4096, 15360, 0.001, 0.3)
    assert at(14.29)[1:] == (4096, 15360, 0.001, 0.1)
    assert at(14.5) == pytest.approx((2.2e-5, 4096, 15360, 0.0, 0.1))
    assert at(14.799) == pytest.approx((7.3e-6, 4096, 15360, 0.0, 0.1))
    assert at(14.83) == pytest.approx((7.3e-6, 32768, 1920, 0.0, 0.1))
    assert at(14.92) == pytest.approx((7.3e-6, 131072, 480, 0.0, 0.1))
    assert curves["sequences in a batch"][0] == 3072


def test_the_drawing_is_the_same_every_time(tmp_path):
    for name in ("first", "second"):
        plot_schedule.main("v3-671b", str(tmp_path / f"{name}.svg"))
    drawn = (tmp_path / "first.svg").read_text()
    assert drawn == (tmp_path / "second.svg").read_text()
    for title in (
        "learning rate",
        "tokens in a sequence",
        "sequences in a batch",
        "bias update speed",
        "weight of the MTP loss",
    ):
        assert f">{title}<" in drawn
        assert f">{title}<" in (DOCS / "schedule.svg").read_text()
