"""What a model weighs and costs, by arithmetic alone. ``benthic.plan(config)`` is :func:`benthic.plan.report.plan`."""

from benthic.callable_package import make_callable

make_callable(__name__, "benthic.plan.report", "plan")
