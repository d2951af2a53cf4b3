"""A run with everything in it, as if trained, whose every foreign text is hostile."""

import json
import math
import random
from pathlib import Path

from benthic.config.load import dump_toml
from benthic.config.posttrain import PosttrainConfig, ProblemsConfig, RlConfig, SftConfig
from benthic.config.presets import PRESETS
from benthic.config.schema import DataConfig, ExtendConfig, RunConfig, TrainConfig
from benthic.data.document import Rejection
from benthic.data.manifest import DataFile, Manifest, SplitManifest
from benthic.evaluate.records import Curve, EvaluationRecord, Sampled
from benthic.evaluate.score import Score
from benthic.posttrain.sft_data import SAMPLES
from benthic.train.ledger import made_with_now

HOSTILE = (
    "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\x00\x1b[31m\u202e"
    "]]>--></style></title>\"'&amp;{{ 7*7 }}{% raw %} ``` |[a](javascript:alert(3)) \ufffe end"
)
"""In HTML, XML, a terminal, a template and Markdown."""

CONFIG = RunConfig(
    model=PRESETS["tiny"].model_copy(update={"num_nextn_predict_layers": 1}),
    data=DataConfig(sources=(HOSTILE,)),
    train=TrainConfig(
        steps=500, sequence_length=64, price_per_hour=1.0, extend=(ExtendConfig(sequence_length=128, steps=20),)
    ),
    posttrain=PosttrainConfig(
        sft=SftConfig(steps=100), rl=RlConfig(problems=(ProblemsConfig(family="chain_sum"),), steps=60)
    ),
)
STAGES = {"pretrain": 500, "extend-1": 20, "sft": 100, "rl": 60}


def write_run(run: Path, stages: dict[str, int] = STAGES) -> Path:
    """A run that has gone through these stages, each so many steps long."""
    run.mkdir()
    (run / "config.toml").write_text(dump_toml(CONFIG), encoding="utf-8")
    _metrics(run, stages)
    entry = {"tokens": 1e6, "flops": 3e15, "wall_hours": 0.2, "device_hours": 0.2, "energy_kwh": 0.003,
             "energy_source": HOSTILE, "cost_usd": 0.2}  # fmt: skip
    made = {name: [made_with_now(), made_with_now() | {"processor": HOSTILE}] for name in stages}
    (run / "ledger.json").write_text(json.dumps({"stages": dict.fromkeys(stages, entry), "made_with": made}))
    for folder in ("data", "sft"):
        (run / folder).mkdir()
        manifest(folder).save(run / folder)
    for number, stage in enumerate(stages):
        record(stage, number).save(run)
    return run


def _metrics(run: Path, stages: dict[str, int]) -> None:
    rng, rows = random.Random(0), []
    for stage, steps in stages.items():
        for step in range(1, steps + 1):
            row = {"stage": stage, "step": step, "loss": 2 + 6 * math.exp(-step / 60) + rng.random() / 5,
                   "mtp_losses": [3 + rng.random()], "learning_rate": 1e-3 * (1 - step / steps / 2),
                   "expert_load_max_over_mean": [1 + 2 * rng.random(), 1.1]}  # fmt: skip
            if stage == "pretrain" and step % 100 == 0:
                row["expert_load"] = [[rng.randrange(1, 40) for _ in range(8)] for _ in range(2)]
            if stage == "rl":
                row |= {"reward": step / 60, "reward_by_source": {HOSTILE: 0.5}, "answer_length": 8.0, "kl": 0.01,
                        "entropy": 1.0, "unfinished": 1, "groups_without_variance": 3}  # fmt: skip
            rows.append(row)
            if step % (steps // 4) == 0:
                rows.append({"stage": stage, "step": step, "top1_accuracy": [0.3, 0.2], **_validation(stage, step)})
    rows.append({"stage": "pretrain", "step": 9, "event": "update skipped", "reason": HOSTILE, "kind": "transient"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _validation(stage: str, step: int) -> dict:
    if stage == "sft":
        return {"answer_bits_per_byte": 1.5 - step / 1000}
    share = {"value": 0.4, "n": 500, "ci95": [0.36, 0.44]}
    more = {"accuracy": {"all": share}, "sampled_accuracy": {"all": share}} if stage == "rl" else {}
    return {"validation_bits_per_byte": 2.0 - step / 1000, **more}


def manifest(folder: str) -> Manifest:
    def split(number: int) -> SplitManifest:
        file = DataFile(name=f"{folder}-{number}.bin", items=10, sha256="ab" * 32)
        return SplitManifest(documents=90 + number, tokens=1000, bytes=4000, shards=(file,), boundaries=file)

    return Manifest(
        documents=181, tokens=2000, bytes=8000, rejected=70, duplicates=5, train_tokens=1000, val_tokens=1000,
        vocab_size=300, dtype="uint16", tokenizer_sha256="cd" * 32, train=split(0), val=split(1),
        settings={"sources": [f"/home/somebody/{HOSTILE}"], "vocab_size": 300, "source_sha256": "ef" * 32,
                  **({SAMPLES: {"train": [9]}} if folder == "sft" else {})},
        rejections=tuple(Rejection(HOSTILE, number, HOSTILE) for number in range(60)),
    )  # fmt: skip


def record(stage: str, number: int) -> EvaluationRecord:
    value = 2.0 - number / 10
    return EvaluationRecord(
        stage=stage, step=3, when="2025-01-31T12:00:00+00:00", seconds=1.0,
        scores={
            "validation": Score("bits_per_byte", value, 90, (value - 0.03, value + 0.03), "bootstrap"),
            HOSTILE: Score(HOSTILE, number / 4, 500, (number / 4, number / 4 + 0.3), "wilson"),
            **({"only": Score("score", 0.5, 1, None)} if number else {}),
        },
        acceptance=(Score("acceptance", 0.4 + number / 100, 1000, (0.35, 0.5), "wilson"),),
        samples=(Sampled(prompt="How deep is the sea?", answer=HOSTILE, wanted=HOSTILE, score=0.25),
                 Sampled(prompt=HOSTILE, answer=f"{stage} says ``````", score=None)),
        pretrained_length=64,
        by_position=(Curve(name="with YaRN", ends=(64, 128, 256), bits_per_byte=(2.0, 1.9, 1.8)),
                     Curve(name=HOSTILE, ends=(64, 128, 256), bits_per_byte=(2.0, 4.0, 8.0))),
        not_measured={HOSTILE: HOSTILE},
    )  # fmt: skip
