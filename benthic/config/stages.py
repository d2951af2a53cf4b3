"""A run as the list of its stages: pretraining, each phase of context extension, and what comes after (post-training).

A stage is a training like any other, with settings of its own, so that one loop runs all of them. What passes from
one to the next are weights and their average (``benthic/train/state.py``). A run that begins with another's weights
has these as its first stage, of no steps, in the place of pretraining.
"""

from dataclasses import dataclass
from typing import Literal

from benthic.config.posttrain import AdapterConfig, PosttrainConfig, RewardModelConfig, RlConfig, SftConfig
from benthic.config.schema import (
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    YarnConfig,
)

PRETRAIN = "pretrain"
BASE = "base"
Kind = Literal["corpus", "base", "sft", "rl", "reward"]
"""What a stage learns from: text as it is, nothing (weights that were brought), answers, rewards; of a reward model,
preferences."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training."""

    name: str
    """Of its folder below ``checkpoints/``, and in metrics and ledger."""
    config: RunConfig
    """All its settings, those of the model among them; ``train`` is this stage's alone."""
    kind: Kind = "corpus"
    adapter: AdapterConfig | None = None
    """Low-rank updates that are trained in the place of the weights themselves."""

    @property
    def steps(self) -> int:
        """Optimizer steps; 0 as long as they are to be measured or counted."""
        return 0 if self.kind == "base" else self.config.train.steps or 0


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order.

    Pretraining is without YaRN if phases of context extension follow it: ``model.rope_scaling`` is then theirs.
    """
    before = config.model_copy(update={"posttrain": PosttrainConfig()})
    first = (Stage(BASE, _without_phases(before), "base"),) if config.posttrain.base else _pretraining(before)
    posttrain = config.posttrain
    last = _on_cpu(first[-1].config.model_copy(update={"posttrain": posttrain}))
    later = []
    if posttrain.sft is not None:
        later.append(Stage("sft", _sft(last, posttrain.sft), "sft", posttrain.sft.adapter))
    if posttrain.rl is not None:
        later.append(Stage("rl", _rl(last, posttrain.rl), "rl"))
    if posttrain.reward is not None:
        later.append(Stage("reward", _reward(last, posttrain.reward), "reward"))
    return *first, *later


def _on_cpu(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})


def _pretraining(config: RunConfig) -> tuple[Stage, ...]:
    phases = range(len(config.train.extend))
    extended = (Stage(f"extend-{number + 1}", _phase(config, number)) for number in phases)
    return Stage(PRETRAIN, without_extension(config)), *extended


def pretraining_alone(config: RunConfig) -> RunConfig:
    """The settings of a run that ends with pretraining."""
    return without_extension(config).model_copy(update={"posttrain": PosttrainConfig()})


def without_extension(config: RunConfig) -> RunConfig:
    """The settings of a run that is like this one, but for context extension."""
    if not config.train.extend:
        return config
    return _without_phases(config).model_copy(update={"model": _before_yarn(config.model)})


def _without_phases(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"extend": ()})})


def _sft(config: RunConfig, sft: SftConfig) -> RunConfig:
    """Settings of a stage over answers, after one with ``config``."""
    return config.model_copy(update={"train": tuned(config.train, sft)})


def tuned(train: TrainConfig, sft: SftConfig) -> TrainConfig:
    """What pretraining's settings become in fine-tuning.

    The learning rate falls along one cosine, MTP and balance weigh what pretraining ends with, and no average is kept:
    the stage begins with that of pretraining.
    """
    schedule = held(train.schedule).model_copy(
        update={
            "warmup": sft.warmup,
            "decay_start": sft.warmup,
            "decay_factor": min(1.0, sft.final_learning_rate / sft.learning_rate),
        }
    )
    return train.model_copy(
        update={
            "steps": sft.steps,
            "minutes": None,
            "sequence_length": sft.sequence_length or train.sequence_length,
            "batch_size": sft.batch_size,
            "micro_batch_size": sft.micro_batch_size,
            "seed": sft.seed,
            "ema_decay": 0.0,
            "ema_span": None,
            "validate_every": sft.validate_every or train.validate_every,
            "checkpoint_every": sft.checkpoint_every or train.checkpoint_every,
            "optimizer": slower(train.optimizer, sft.learning_rate),
            "schedule": schedule,
            "extend": (),
        }
    )


def _rl(config: RunConfig, rl: RlConfig) -> RunConfig:
    """Settings of a stage over rewards, after one with ``config``."""
    mtp = held(config.train.schedule).mtp_loss_weight if rl.mtp_loss_weight is None else rl.mtp_loss_weight
    schedule = {"warmup": rl.warmup, "mtp_loss_weight": mtp, "mtp_late_loss_weight": mtp}
    if rl.final_learning_rate is not None:
        schedule |= {"decay_start": rl.warmup, "decay_factor": rl.final_learning_rate / rl.learning_rate}
    return _by_its_loss_alone(config, rl, rl.prompts * rl.group_size, schedule)


def _reward(config: RunConfig, reward: RewardModelConfig) -> RunConfig:
    """Settings of the training of a reward model."""
    return _by_its_loss_alone(config, reward, reward.batch_size, {})


def _by_its_loss_alone(
    config: RunConfig, stage: RlConfig | RewardModelConfig, batch_size: int, schedule: dict[str, float]
) -> RunConfig:
    """Settings of a stage that nothing but its loss moves the model in: routers' bias and balance are left as they are,
    and weights do not decay.
    """
    still = {"bias_update_speed": 0.0, "balance_loss_weight": 0.0}
    train = {
        "steps": stage.steps,
        "minutes": None,
        "batch_size": batch_size,
        "micro_batch_size": stage.micro_batch_size,
        "seed": stage.seed,
        "ema_decay": 0.0,
        "ema_span": None,
        "validate_every": stage.validate_every or config.train.validate_every,
        "checkpoint_every": stage.checkpoint_every or config.train.checkpoint_every,
        "optimizer": OptimizerConfig(learning_rate=stage.learning_rate, weight_decay=0.0),
        "schedule": held(config.train.schedule).model_copy(update={**still, **schedule}),
        "extend": (),
    }
    precision = PrecisionConfig(compute=stage.compute)
    return config.model_copy(update={"train": config.train.model_copy(update=train), "precision": precision})


def slower(optimizer: OptimizerConfig, rate: float) -> OptimizerConfig:
    """The same optimizer with another peak rate of AdamW's; the others change in proportion."""
    share, embedding = rate / optimizer.learning_rate, optimizer.embedding_learning_rate
    others = {
        "matrix_learning_rate": optimizer.matrix_learning_rate * share,
        "embedding_learning_rate": None if embedding is None else embedding * share,
    }
    return optimizer.model_copy(update={"learning_rate": rate, **others})


def held(schedule: ScheduleConfig) -> ScheduleConfig:
    """What a schedule ends with, its learning rate apart, from the first step to the last."""
    mtp = schedule.mtp_late_loss_weight if schedule.mtp_late_start < 1 else schedule.mtp_loss_weight
    return ScheduleConfig(
        warmup=0.0,
        decay_start=1.0,
        decay_end=1.0,
        decay_factor=1.0,
        tail_start=1.0,
        tail_factor=1.0,
        bias_update_speed=schedule.bias_update_speed if schedule.bias_update_until >= 1 else 0.0,
        bias_update_until=1.0,
        balance_loss_weight=schedule.balance_loss_weight,
        mtp_loss_weight=mtp,
        mtp_late_loss_weight=mtp,
        mtp_late_start=1.0,
    )


def _before_yarn(model: ModelConfig) -> ModelConfig:
    yarn = model.rope_scaling
    if yarn is None:
        return model
    return model.model_copy(
        update={"rope_scaling": None, "max_position_embeddings": yarn.original_max_position_embeddings}
    )


def _phase(config: RunConfig, number: int) -> RunConfig:
    train, phase = config.train, config.train.extend[number]
    yarn = config.model.rope_scaling or YarnConfig(
        factor=train.extend[-1].sequence_length / train.sequence_length,
        original_max_position_embeddings=train.sequence_length,
    )
    model = config.model.model_copy(update={"rope_scaling": yarn, "max_position_embeddings": yarn.reach})
    rate = phase.learning_rate or train.optimizer.learning_rate * train.schedule.last_factor
    settings = {
        "steps": phase.steps,
        "minutes": None,
        "sequence_length": phase.sequence_length,
        "batch_size": _batch_size(train, number),
        "micro_batch_size": _micro_batch_size(train, number),
        # Other documents stand side by side in a phase than in the stage before it.
        "seed": train.seed + number + 1,
        "optimizer": slower(train.optimizer, rate),
        "schedule": held(train.schedule),
        "extend": (),
    }
    return config.model_copy(update={"model": model, "train": train.model_copy(update=settings)})


def _batch_size(train: TrainConfig, number: int) -> int:
    phase = train.extend[number]
    return phase.batch_size or max(1, train.batch_size * train.sequence_length // phase.sequence_length)


def _micro_batch_size(train: TrainConfig, number: int) -> int:
    phase, batch = train.extend[number], _batch_size(train, number)
    if phase.micro_batch_size is not None:
        return phase.micro_batch_size
    tokens = (train.micro_batch_size or train.batch_size) * train.sequence_length
    most = max(1, tokens // phase.sequence_length)
    return max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)
