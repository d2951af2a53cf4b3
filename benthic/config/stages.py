"""A run as the list of its stages: pretraining, then each phase of context extension.

A stage is a training like any other, with settings of its own, so that one loop runs all of them. What passes from
one to the next are weights and their average (``benthic/train/state.py``).
"""

from dataclasses import dataclass

from benthic.config.schema import ModelConfig, RunConfig, ScheduleConfig, TrainConfig, YarnConfig

PRETRAIN = "pretrain"


@dataclass(frozen=True)
class Stage:
    """A stretch of training."""

    name: str
    """Of its folder below ``checkpoints/``, and in metrics and ledger."""
    config: RunConfig
    """All its settings, those of the model among them; it has no further stages."""


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order.

    Pretraining is without YaRN if phases of context extension follow it: ``model.rope_scaling`` is then theirs.
    """
    phases = range(len(config.train.extend))
    first = config
    if phases:
        train = config.train.model_copy(update={"extend": ()})
        first = config.model_copy(update={"model": _before_yarn(config.model), "train": train})
    return Stage(PRETRAIN, first), *(Stage(f"extend-{number + 1}", _phase(config, number)) for number in phases)


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
    share = rate / train.optimizer.learning_rate
    optimizer = train.optimizer.model_copy(
        update={"learning_rate": rate, "matrix_learning_rate": train.optimizer.matrix_learning_rate * share}
    )
    settings = {
        "steps": phase.steps,
        "minutes": None,
        "sequence_length": phase.sequence_length,
        "batch_size": _batch_size(train, number),
        "micro_batch_size": _micro_batch_size(train, number),
        # Other documents stand side by side in a phase than in the stage before it.
        "seed": train.seed + number + 1,
        "optimizer": optimizer,
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
