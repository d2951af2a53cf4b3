"""Refusals of sizes that do not fit, each with what would."""

import pytest

from benthic.config.load import load_run_config
from benthic.errors import InputError
from benthic.parallel.fits import refuse_misfit


def config(*settings):
    return load_run_config("tiny", ["train.batch_size=12", *settings])


@pytest.mark.parametrize(
    ("processes", "settings", "says"),
    [
        (1, ["parallel.expert=2", "parallel.shard=2"], "torchrun --nproc-per-node 4"),
        (4, [], "--set parallel.shard=4"),
        (4, ["parallel.expert=2"], "--set parallel.shard=2"),
        (3, ["parallel.expert=2"], "torchrun --nproc-per-node 2"),
        (3, ["parallel.expert=3"], "parallel.expert=3 must divide model.n_routed_experts=8: 1, 2, 4 or 8 would"),
        (8, ["parallel.shard=8"], "train.batch_size=12 cannot be divided among 8 data ranks"),
        (8, ["parallel.shard=8"], "; 16 can"),
        (2, ["parallel.expert=2", "parallel.fp8_dispatch=true"], 'precision.compute="fp8"'),
        (1, ["parallel.fp8_dispatch=true"], 'precision.compute="fp8"'),
        (1, ["parallel.layers=[99]"], "parallel.pipeline is 1"),
        (2, ["parallel.shard=2", "parallel.layers=[2,1]"], "parallel.pipeline is 1"),
        (2, ["parallel.shard=2", "train.minutes=3"], "give train.steps"),
        (2, ["parallel.shard=2", "train.device=cuda"], "through gloo"),
        (2, ["parallel.shard=2", "train.schedule.mtp_from_last_layer=true"], "it is for one process"),
        (64, ["parallel.pipeline=64"], "makes 64 stages, too many for model.num_hidden_layers=3; 5 can"),
        (4, ["parallel.pipeline=4", "parallel.schedule=zbv"], "makes 8 stages, too many"),
        (2, ["parallel.pipeline=2", "parallel.layers=[1,1,1]"], "must be 2 numbers, one for each stage, that add up"),
        (2, ["parallel.pipeline=2", "parallel.layers=[1,1]"], "add up to model.num_hidden_layers=3"),
        (2, ["parallel.pipeline=2", "parallel.schedule=zbv", "parallel.layers=[1,0,1,1]"], "only the first and"),
        (4, ["parallel.pipeline=2", "parallel.shard=2", "parallel.zero=3"], "parallel.zero=3 must be 1"),
        (2, ["parallel.pipeline=2"], "none (that is, 12) leaves parallel.pipeline=2 processes fewer"),
        (4, ["parallel.pipeline=2", "parallel.shard=2", "train.micro_batch_size=4"], "at most 3 would do"),
        (16, ["parallel.pipeline=4", "parallel.shard=4", "train.micro_batch_size=1"], "a batch of 16 and 1 would do"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line_that_says_what_would(processes, settings, says):
    with pytest.raises(InputError) as caught:
        refuse_misfit(config(*settings), processes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, []),
        (12, ["parallel.shard=3", "parallel.replicate=4"]),
        (8, ["parallel.expert=4", "parallel.pipeline=2", "train.micro_batch_size=1", "parallel.layers=[3,0]"]),
        (4, ["parallel.pipeline=2", "parallel.shard=2", "train.micro_batch_size=3", "parallel.schedule=dualpipev"]),
        (2, ["parallel.expert=2", "parallel.fp8_dispatch=true", "precision.compute=fp8"]),
    ],
)
def test_what_fits_is_accepted(processes, settings):
    refuse_misfit(config(*settings), processes)
