"""Pretraining: losses, optimizer and schedules, the step, checkpoints, metrics, the loop."""

from benthic.callable_package import make_callable

make_callable(__name__, "benthic.api", "train")
