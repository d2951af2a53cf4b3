"""Idle time of real processes whose stages only wait: within a tenth of what is published."""

import pytest

from benthic.lab.bubbles import measure_idle
from benthic.parallel.timeline import Times


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
@pytest.mark.parametrize("stages", [4, 8])
def test_idle_time_is_the_published(schedule, stages):
    # Long enough that messages and late wake-ups are little beside it, also on a machine with fewer processors.
    idle = measure_idle(schedule, stages, stages, Times(0.4, 0.4, 0.4))
    assert idle.measured == pytest.approx(idle.published, rel=0.1)
    assert idle.simulated == pytest.approx(idle.published, rel=1e-9)
