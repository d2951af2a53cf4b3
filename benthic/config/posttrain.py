"""Settings of what comes after pretraining: fine-tuning, learning from rewards, reward models, distillation."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from benthic.config.base import Fraction, Natural, Positive, Seed, Settings, check_passes


class AdapterConfig(Settings):
    """Low-rank updates of chosen matrices (LoRA, arXiv 2106.09685): W + alpha / rank * B A, with W as it was."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update's scale is ``alpha / rank``."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)
    """Which matrices: parts of their names, such as ``attention``, ``q_b``, ``ffn.shared``, ``experts`` or ``mtp``."""


PROBLEMS = "problems"
"""Name of the source of conversations that is made of the problems of reinforcement learning."""


class ConversationsConfig(Settings):
    """One source of conversations in a mixture."""

    source: str
    """``chitchat``, or ``problems``, those of ``posttrain.rl`` with right answers, or the path of a .jsonl file, or of
    a folder of them, with a conversation a line."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How many times an epoch reads each conversation: with 0.5 it reads half of them, others each time."""


class SftConfig(Settings):
    """Supervised fine-tuning on the answers in conversations (V3 report section 5.1)."""

    sources: tuple[ConversationsConfig, ...] = ()
    """By default those of ``data.sources``."""
    problems: Positive = 1000
    """How many of each source's problems the source ``problems`` tells the answers of."""
    answers: Literal["all", "last"] = "all"
    """Which of a conversation's answers are learnt."""
    epochs: Positive | None = None
    steps: Positive | None = None
    batch_size: Positive = 8
    """Sequences per optimizer step, each packed with as many whole conversations as fit."""
    micro_batch_size: Positive | None = None
    """Sequences per forward and backward pass; by default the whole batch."""
    sequence_length: Positive | None = None
    """By default that of the stage before."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """AdamW's rate, as published for 671 billion parameters; small models need more. Muon's is in proportion."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """What the rate falls to along a cosine."""
    warmup: Fraction = 0.0
    mtp_rehearsal: Natural = 8
    """Sequences of pretraining's text that MTP modules read in each step, to draft what the model says there by now."""
    seed: Seed = 0
    validate_every: Positive | None = None
    checkpoint_every: Positive | None = None
    adapter: AdapterConfig | None = None
    """Train low-rank updates in the place of the weights: less memory."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate:g} must be at most learning_rate={self.learning_rate:g}"
            )
        check_passes(self.batch_size, self.micro_batch_size)
        return self


class RewardConfig(Settings):
    """One of the rewards that an answer's is the sum of."""

    name: Annotated[str, Field(min_length=1)]
    """One of Benthic's (``exact``, ``numeric``, ``reasoning``, ``json_schema``, ``code``, ``reasoning_gym``), a
    function of your own as ``module:function``, or the directory of a reward model."""
    weight: float = 1.0


class ProblemsConfig(Settings):
    """One source of problems: a family of reasoning-gym's, or a file."""

    family: str | None = None
    """reasoning-gym's name of the family, such as ``chain_sum``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The family's own, such as ``max_digits``."""
    file: str | None = None
    """A .jsonl file with a problem a line: ``prompt`` or ``messages``, and what its rewards ask for."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share of the prompts, among those of all sources."""
    rewards: tuple[RewardConfig, ...] = ()
    """By default ``reasoning_gym`` for its families, and ``exact`` for files."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.family is None) == (self.file is None):
            raise ValueError("give either family or file")
        if self.settings and self.family is None:
            raise ValueError("settings are those of a family of reasoning-gym's; a file has none")
        return self


class RlConfig(Settings):
    """Reinforcement learning by GRPO (arXiv 2402.03300, section 4) on problems whose answers can be judged."""

    problems: Annotated[tuple[ProblemsConfig, ...], Field(min_length=1)]
    steps: Positive = 200
    """Optimizer steps."""
    prompts: Positive = 16
    """Problems that answers are sampled to at a time."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers to each problem; they are measured against each other."""
    updates: Positive = 1
    """Optimizer steps on the same answers."""
    max_new_tokens: Positive = 64
    """Of an answer; one that is not ended by then gets no reward."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    at_once: Positive = 256
    """Answers that are written at the same time."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's; small models need more."""
    final_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """What the rate falls to along a cosine; by default it is held."""
    warmup: Fraction = 0.0
    micro_batch_size: Positive | None = None
    """Answers per forward and backward pass; by default all."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """How far the ratio of new to old probability counts; above ``clip_low``, unlikely tokens have more room."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.04
    """Of the divergence from the model that the stage begins with; at 0 that is not kept in memory."""
    deviation: bool = True
    """Divide advantages by their group's deviation, as published."""
    average: Literal["sequence", "token", "constant"] = "sequence"
    """What counts alike: answers, as published; tokens; or tokens, whatever the length of the answers."""
    mtp_loss_weight: Annotated[float, Field(ge=0)] | None = None
    """By default what pretraining ends with. MTP modules learn from the answers, the model below them does not."""
    mtp_rehearsal: Natural = 8
    """Sequences of pretraining's text, and as many of fine-tuning's conversations, that MTP modules read in each step,
    to draft what the model says there by now."""
    reward_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For one reward of one answer."""
    compute: Literal["fp32", "fp32-tiles", "bf16", "fp8"] = "fp32"
    """Arithmetic of training; the sampler's is fp32, and what differs is logged as ``mismatch``."""
    held_out: Positive = 500
    """Problems of each source that are kept for validation and never trained on."""
    held_out_quick: Positive = 100
    """Those of them that validations during the stage read; before it and at its end all are read."""
    validate_every: Positive | None = None
    checkpoint_every: Positive | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final_learning_rate is not None and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate:g} must be at most learning_rate={self.learning_rate:g}"
            )
        check_passes(self.prompts * self.group_size, self.micro_batch_size)
        return self


class RewardModelConfig(Settings):
    """A reward model, trained on pairs of answers by the loss of Bradley and Terry; a run of its own."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)]
    """.jsonl files with ``prompt`` or ``messages``, and the answers that were ``chosen`` and ``rejected``."""
    epochs: Positive | None = None
    steps: Positive | None = None
    batch_size: Positive = 16
    """Pairs per optimizer step."""
    micro_batch_size: Positive | None = None
    """Pairs per forward and backward pass; by default the whole batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """AdamW's; small models need more."""
    held_out: Positive = 100
    """Pairs, the last ones, that are kept for validation."""
    compute: Literal["fp32", "fp32-tiles", "bf16", "fp8"] = "fp32"
    validate_every: Positive | None = None
    checkpoint_every: Positive | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        check_passes(self.batch_size, self.micro_batch_size)
        return self


class DistilConfig(Settings):
    """Answers of a teacher, filtered by rewards, to fine-tune on (DeepSeek-R1, arXiv 2501.12948, section 2.4)."""

    teacher: Annotated[str, Field(min_length=1)]
    """An OpenAI-compatible endpoint, ``http://127.0.0.1:8000/v1``, or a directory: a run, or a model."""
    model: str | None = None
    """The endpoint's name for it; may be left out where it has one model only."""
    api_key_env: str | None = None
    """The environment variable that holds the endpoint's key. Keys are no settings: files are copied."""
    problems: Annotated[tuple[ProblemsConfig, ...], Field(min_length=1)]
    """What is asked. By default families are judged by ``reasoning_gym`` and files by nothing."""
    count: Positive = 1000
    """Problems of each source; of a file at most all that it has."""
    held_out: Natural | None = None
    """Problems of each source that are never asked, chosen as in ``posttrain.rl``; by default 500 of families and none
    of files."""
    samples: Positive = 1
    """Answers to each problem."""
    keep: Positive = 1
    """Answers to each problem that are kept at most: those with the highest reward."""
    least_reward: float | None = None
    """What an answer must be worth to be kept; by default all the reward there is."""
    system: str | None = None
    """Told to the teacher before each problem, and left out of what is learnt."""
    max_new_tokens: Positive = 512
    """Of an answer; one that is not ended by then is not kept."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    at_once: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests at the same time."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """For one request, from its first byte to the last of its answer."""
    retries: Natural = 4
    """Of a request that failed, at growing intervals."""
    reward_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For one reward of one answer."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples={self.samples}: temperature must be above 0, or all would be the same")
        return self


class PosttrainConfig(Settings):
    """The stages after pretraining, each of which a run has if its section is there."""

    base: str | None = None
    """A run or model directory whose weights and tokenizer the run begins with, in the place of pretraining."""
    sft: SftConfig | None = None
    rl: RlConfig | None = None
    reward: RewardModelConfig | None = None
    """Not a stage of the run: ``benthic reward`` trains it."""
    distil: DistilConfig | None = None
    """Not a stage of the run: ``benthic distil`` asks the teacher."""

    @model_validator(mode="after")
    def _there_are_problems(self) -> Self:
        if self.rl is None and self.sft is not None and PROBLEMS in (one.source for one in self.sft.sources):
            raise ValueError(
                f"sft.sources: source = {PROBLEMS!r} is made of posttrain.rl, which is not there; `benthic problems` "
                "writes them as a file"
            )
        return self

    @model_validator(mode="after")
    def _something_follows(self) -> Self:
        stages = [name for name in type(self).model_fields if name != "base"]
        if self.base is not None and not any(getattr(self, name) for name in stages):
            raise ValueError(f"base={self.base!r} needs a stage after it: posttrain.{' or posttrain.'.join(stages)}")
        return self
