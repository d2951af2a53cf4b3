"""A recipe with every stage, so small that all of it takes seconds, and a run of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benthic.config.load import dump_toml
from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig
from benthic.run import whole

WORDS = ["sea", "deep", "dark", "cold", "light", "slow", "fish", "drift", "soft", "mud"]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations, problems with answers, and a task."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    lines = []
    for number in range(200):
        said = rng.choices(WORDS, k=rng.randrange(4, 12))
        lines.append([("user", f"{number} {' '.join(said)}"), ("assistant", " ".join(reversed(said)))])
    _write(folder / "chats.jsonl", ({"messages": [{"role": r, "content": t} for r, t in one]} for one in lines))
    _write(folder / "letters.jsonl", ({"prompt": f"{a}{b}", "answer": b} for a in "abcdefghij" for b in "deepsa"))
    _write(folder / "choice.jsonl", ({"prompt": "the", "choices": [" sea", " zzz"], "answer": 0} for _ in range(5)))
    return folder


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def whole_config(sources: Path) -> Callable[..., RunConfig]:
    """Keywords go over whole sections."""

    def build(**sections: Any) -> RunConfig:
        sft = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "validate_every": 3,
               "sequence_length": 64, "problems": 20,
               "sources": ({"source": "problems"}, {"source": str(sources / "chats.jsonl")})}  # fmt: skip
        rl = {"steps": 3, "prompts": 2, "group_size": 3, "max_new_tokens": 4, "learning_rate": 1e-3, "held_out": 6,
              "held_out_quick": 3, "checkpoint_every": 2, "validate_every": 3,
              "problems": ({"file": str(sources / "letters.jsonl")},)}  # fmt: skip
        settings: dict[str, Any] = {
            "model": {**PRESETS["tiny"].model_dump(), "num_hidden_layers": 2, "num_nextn_predict_layers": 2},
            "data": {"sources": (str(sources / "chats.jsonl"),), "validation_fraction": 0.3, "mask_documents": True},
            "train": {"steps": 5, "batch_size": 2, "sequence_length": 32, "validate_every": 3, "checkpoint_every": 2,
                      "validation_tokens": 256, "optimizer": {"learning_rate": 3e-3},
                      "extend": ({"sequence_length": 128, "steps": 3, "batch_size": 2},)},
            "precision": {"compute": "fp32"}, "posttrain": {"sft": sft, "rl": rl},
            "evaluation": {"tasks": (str(sources / "choice.jsonl"),), "prompts": ("hello", "sea"), "sequences": 3,
                           "max_new_tokens": 5, "retrieval": 3},
        }  # fmt: skip
        return RunConfig.model_validate(settings | sections)

    return build


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of this machine, which takes a second to measure, is made up."""
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)
    monkeypatch.setattr("benthic.run.forecast.measure_gemm_gflops", lambda: 100.0)


@pytest.fixture
def recipe(whole_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """As a file."""
    path = tmp_path / "whole.toml"
    path.write_text(dump_toml(whole_config()))
    return path


@pytest.fixture(scope="session")
def whole_run(whole_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with (
        mock.patch("benthic.train.loop.measure_gemm_gflops", return_value=100.0),
        mock.patch("benthic.run.forecast.measure_gemm_gflops", return_value=100.0),
    ):
        whole.run(whole.plan(whole_config(), out), out)
    return out
