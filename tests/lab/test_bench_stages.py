"""Costs of stages as measured: of every part, and the cut that follows from them."""

import pytest

from benthic.config.load import load_run_config
from benthic.errors import InputError
from benthic.lab import bench_stages


def config(*settings):
    return load_run_config("tiny", ["train.batch_size=4", "train.micro_batch_size=1", *settings])


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
def test_all_parts_are_measured_and_cut(compute):
    found = bench_stages.bench_stages(config("parallel.pipeline=2", f"precision.compute={compute}"))
    assert min(found.embedding_s, found.dense_layer_s, found.moe_layer_s, found.head_s) > 0
    assert sum(found.layers) == sum(found.layers_by_operations) == 3
    assert 1 <= found.dearest_over_mean <= found.dearest_over_mean_by_operations


def test_the_cut_follows_what_was_measured(monkeypatch):
    seconds = {"embedding": 0.0, "dense": 1.0, "moe": 3.0, "head": 6.0}
    monkeypatch.setattr(bench_stages, "_measure", lambda *_, **__: seconds)
    settings = ["parallel.pipeline=3", "model.num_hidden_layers=6", "model.first_k_dense_replace=3"]
    found = bench_stages.bench_stages(config(*settings))
    assert found.layers == [4, 2, 0]
    assert found.dearest_over_mean == 1.0
    assert found.dearest_over_mean_by_operations >= 1.0


def test_without_a_pipeline_there_is_nothing_to_cut():
    with pytest.raises(InputError, match=r"parallel\.pipeline=1 has no stages"):
        bench_stages.bench_stages(config())
