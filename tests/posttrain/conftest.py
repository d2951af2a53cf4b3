"""A pretrained run on plain texts and conversations, and conversations to fine-tune it on."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benthic.api import KINDS
from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig
from benthic.data.prepare import prepare
from benthic.train.loop import train

WORDS = ["sea", "deep", "dark", "cold", "light", "slow", "fish", "drift", "soft", "mud"]
PHASE = {"steps": 6, "batch_size": 3, "learning_rate": 2e-3, "final_learning_rate": 2e-4, "validate_every": 4,
         "checkpoint_every": 3}  # fmt: skip


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations whose answers repeat the question backwards."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for number in range(90):
        messages = []
        for _ in range(rng.randrange(1, 4)):
            said = rng.choices(WORDS, k=rng.randrange(1, 5))
            messages += [{"role": "user", "content": " ".join([str(number), *said])},
                         {"role": "assistant", "content": " ".join(reversed(said))}]  # fmt: skip
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def sft_config(chats: Path) -> Callable[..., RunConfig]:
    """A run of a tiny model, pretrained for some steps on the conversations; keywords go to ``posttrain.sft``."""

    def build(train: dict[str, Any] | None = None, **sft: Any) -> RunConfig:
        settings = {
            "steps": 4, "batch_size": 3, "sequence_length": 48, "validate_every": 4, "validation_tokens": 512,
            "checkpoint_every": 2, "optimizer": {"learning_rate": 3e-3}, **(train or {}),
        }  # fmt: skip
        return RunConfig.model_validate({
            "model": {**PRESETS["tiny"].model_dump(), "num_hidden_layers": 2},
            "data": {"sources": (str(chats),), "validation_fraction": 0.2},
            "train": settings, "precision": {"compute": "fp32"},
            "posttrain": {"sft": {key: value for key, value in {**PHASE, **sft}.items() if value is not None}},
        })  # fmt: skip

    return build


@pytest.fixture(scope="session")
def chats_prepared(tmp_path_factory: pytest.TempPathFactory, sft_config: Callable[..., RunConfig]) -> Path:
    """A directory with data and tokenizer of the conversations."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(sft_config().data, 320, out)
    return out


@pytest.fixture
def make_sft_run(chats_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fresh run directories on the prepared data. The GEMM peak, which takes a second to measure, is made up."""
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)

    def make(name: str = "run") -> Path:
        out = tmp_path / name
        out.mkdir()
        for part in ("data", "tokenizer"):
            (out / part).symlink_to(chats_prepared / part)
        return out

    return make


@pytest.fixture
def run_all() -> Callable[..., Any]:
    """Trains every stage."""
    return lambda config, out: train(config, out, kinds=KINDS)
