"""The plan's fields are the keys other programs read."""

import benthic
from benthic.config.load import load_preset_or_recipe


def test_plan_of_v3():
    plan = benthic.plan(load_preset_or_recipe("v3-671b"))
    assert (plan.kv_bytes_per_token, plan.sequence_length) == (70_272, 4096)
    assert sum(plan.parameters.values()) == plan.total_parameters
    assert plan.active_parameters - plan.active_parameters_without_embedding == plan.parameters["embedding"]


def test_a_callable_package_is_still_a_package():
    import benthic.plan.counts

    assert callable(benthic.plan)
    assert benthic.plan.counts.Counts(head=2, norms=1).total == 3
