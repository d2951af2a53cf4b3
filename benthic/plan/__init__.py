"""What a model and its training weigh and cost, by arithmetic alone.

``benthic.plan(config)`` is :func:`benthic.train.planned.plan`, which stands above, beside the code that divides models.
"""

from benthic.callable_package import make_callable

make_callable(__name__, "benthic.train.planned", "plan")
