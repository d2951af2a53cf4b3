"""Every setting of a run, frozen and validated, so that a wrong value is refused before anything is written.

Names are those of the published configs (``kv_lora_rank``, ``n_routed_experts``). Fields that are fractions of
the run let one recipe serve three million tokens and fourteen trillion alike.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from benthic.config.base import Fraction, Natural, Positive, Seed, Settings, check_passes
from benthic.config.posttrain import PosttrainConfig


class YarnConfig(Settings):
    """YaRN context extension of the decoupled rotary key (arXiv 2309.00071; V3 report section 4.3)."""

    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Positive
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def reach(self) -> int:
        """Tokens that the interpolated positions reach to."""
        return round(self.factor * self.original_max_position_embeddings)


class ModelConfig(Settings):
    """Sizes of a DeepSeek-V3-style transformer (arXiv 2412.19437 sections 2.1, 2.2 and 4.2)."""

    vocab_size: Positive
    hidden_size: Positive
    num_hidden_layers: Positive
    first_k_dense_replace: Natural = 1
    intermediate_size: Positive
    num_attention_heads: Positive
    q_lora_rank: Positive | None = None
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    v_head_dim: Positive
    n_routed_experts: Positive
    moe_intermediate_size: Positive
    n_shared_experts: Natural = 1
    num_experts_per_tok: Positive
    n_group: Positive = 1
    topk_group: Positive = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    num_nextn_predict_layers: Natural = 0
    max_position_embeddings: Positive = 4096
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: YarnConfig | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    initializer_range: Annotated[float, Field(gt=0)] = 0.006

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} must be at most n_group={self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be at most {reachable}, "
                f"the experts in topk_group={self.topk_group} groups"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} must be at most "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the cache holds per token and layer: compressed latent and shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class DataConfig(Settings):
    """Which text, and how it becomes training sequences."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)] = ("chitchat",)
    """``chitchat``, ``stdlib``, or paths of .txt, .md, .py and .jsonl files or folders of them."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents held out; a document is in one split only."""
    tokenizer: str | None = None
    """A tokenizer directory to use; by default one is trained on the training split."""
    mask_documents: bool = False
    """Keep attention and MTP within documents; the published pretraining packs without masks."""
    conversations: Literal["chat", "text"] = "chat"
    """How pretraining reads conversations: in the chat format, or as text, a turn a line, so that it is fine-tuning
    that teaches the format."""
    seed: Seed = 0


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW as published (V3 report section 4.2), or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2.2e-4
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Muon's peak rate for hidden matrices; ``learning_rate`` then serves embedding, head, norms and gates."""
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """AdamW's peak rate for the embedding; by default ``learning_rate``. It keeps its proportion in context extension
    and fine-tuning; adapters, and stages that learn from rewards, have one rate for all."""
    matrix_products: Literal["auto", "fp32", "bf16"] = "auto"
    """What Muon orthogonalises in; ``auto`` is bf16 where the device has units for it, as found when the run begins."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class ScheduleConfig(Settings):
    """The published course of a run (V3 report section 4.2): warm-up a fraction of its steps, every other moment a
    fraction of its tokens.

    The learning rate rises linearly until ``warmup``, stays at its peak until ``decay_start``, falls along a cosine
    to ``decay_factor`` of the peak at ``decay_end``, stays there until ``tail_start`` and ends at ``tail_factor``.
    """

    warmup: Fraction = 0.02
    decay_start: Fraction = 10.0 / 14.8
    decay_end: Fraction = 14.3 / 14.8
    decay_factor: Fraction = 0.1
    tail_start: Fraction = 14.633 / 14.8
    tail_factor: Fraction = 7.3 / 220.0
    batch_ramp: Fraction = 0.0
    """The batch grows from ``batch_ramp_start`` of its size to all of it over this fraction."""
    batch_ramp_start: Annotated[float, Field(gt=0, le=1)] = 0.2
    bias_update_speed: Annotated[float, Field(ge=0)] = 0.001
    bias_update_until: Fraction = 14.3 / 14.8
    balance_loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    mtp_loss_weight: Annotated[float, Field(ge=0)] = 0.3
    mtp_late_loss_weight: Annotated[float, Field(ge=0)] = 0.1
    mtp_late_start: Fraction = 10.0 / 14.8
    mtp_every: Positive = 1
    """The MTP loss counts in one step of so many, and in a shorter run in none. Context extension and later stages have
    it in each."""
    mtp_from_last_layer: bool = False
    """Where the MTP loss first counts in the course of pretraining, its modules begin as the last layer is by then, and
    not as they were drawn. Published models train them from the start."""

    @property
    def last_factor(self) -> float:
        """The share of its peak that the learning rate ends with: a moment at the very end never comes."""
        if self.tail_start < 1:
            return self.tail_factor
        return self.decay_factor if self.decay_start < 1 else 1.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        moments = ("warmup", "decay_start", "decay_end", "tail_start")
        for earlier, later in pairwise(moments):
            if getattr(self, earlier) > getattr(self, later):
                raise ValueError(
                    f"{earlier}={getattr(self, earlier):g} must not be after {later}={getattr(self, later):g}"
                )
        return self


class ExtendConfig(Settings):
    """A phase of context extension (V3 report section 4.3): training goes on with longer sequences, under YaRN.

    All phases use one YaRN: ``model.rope_scaling`` where it is given, otherwise one that reaches from
    ``train.sequence_length`` to the longest phase.
    """

    sequence_length: Positive
    steps: Positive
    batch_size: Positive | None = None
    """Sequences per optimizer step; by default as many as keep the tokens of pretraining's batch, as published."""
    micro_batch_size: Positive | None = None
    """Sequences per pass; by default as many as divide the batch and read no more tokens than one of pretraining's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """AdamW's rate, held throughout; Muon's is in proportion. By default what pretraining ends with, as published."""

    @model_validator(mode="after")
    def _passes_divide_the_batch(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size is None:
            raise ValueError("micro_batch_size needs batch_size beside it")
        check_passes(self.batch_size, self.micro_batch_size)
        return self


class TrainConfig(Settings):
    """Pretraining, and the phases of context extension after it: length, batch, optimizer and what is kept."""

    steps: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Instead of ``steps``: as many steps as this machine does in so many minutes, measured at the start."""
    batch_size: Positive = 8
    """Sequences per optimizer step."""
    micro_batch_size: Positive | None = None
    """Sequences per forward and backward pass; by default the whole batch."""
    sequence_length: Positive = 256
    device: Literal["cpu", "cuda"] = "cpu"
    """Where one process pretrains, context extension included; all else runs on the CPU. No GPU has been tried."""
    recompute: bool = False
    """Compute outputs of norms, MLA's up-projections and SwiGLU again in the backward pass instead of keeping them
    (V3 report section 3.2.3): less memory, a little more time, the same numbers."""
    seed: Seed = 0
    embedding_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation that the embedding begins with; by default ``model.initializer_range``, as published."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay, a step, of an exponential moving average of the weights kept beside them; 0 keeps none."""
    ema_span: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of ``ema_decay``: the fraction of pretraining's steps over which a weight's share falls to 1/e."""
    validate_every: Positive = 200
    """Steps between validations."""
    validation_tokens: Positive = 65536
    """Tokens of a validation during the run; the last one reads the whole held-out split."""
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    on_spike: Literal["keep", "skip", "roll_back"] = "keep"
    """What becomes of a step whose loss or gradient norm spikes, and does so again when its batch is run again: it is
    taken, or left out, or the run goes back to the last checkpoint and passes over all it has read since."""
    spike_deviations: Annotated[float, Field(gt=0)] = 10.0
    """A spike lies so many robust standard deviations above the median of the last 64 steps."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that metrics are sent to besides ``metrics.jsonl``."""
    expert_load_every: Natural = 0
    """Steps between records of every expert's load in ``metrics.jsonl``; 0 keeps none."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Dollars an hour of this machine (of one device, where there are several) costs; the ledger adds them up."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    extend: tuple[ExtendConfig, ...] = ()
    """Phases of context extension, in order, each a stage of its own after pretraining."""

    @model_validator(mode="after")
    def _length_given_once(self) -> Self:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        if self.ema_decay and self.ema_span is not None:
            raise ValueError("give either ema_decay or ema_span")
        check_passes(self.batch_size, self.micro_batch_size)
        return self

    @model_validator(mode="after")
    def _phases_follow(self) -> Self:
        before = self.sequence_length
        for number, phase in enumerate(self.extend):
            if phase.sequence_length <= before:
                raise ValueError(
                    f"extend.{number}.sequence_length={phase.sequence_length} must be greater than {before}, "
                    "the length before it"
                )
            before = phase.sequence_length
            if phase.learning_rate is None and not self.schedule.last_factor:
                raise ValueError(f"extend.{number}.learning_rate must be given, for pretraining ends with a rate of 0")
        return self


class PrecisionConfig(Settings):
    """Arithmetic of training; master weights and gradients are always fp32."""

    compute: Literal["auto", "fp32", "fp32-tiles", "bf16", "fp8"] = "auto"
    """``auto`` times steps in fp32 and in bf16 and takes the faster; bf16 pays only on units that have it.
    ``fp32-tiles`` is as exact as fp32 and mostly faster, on processors with bf16 tiles (AMX) that few others use.
    ``fp8`` trains as published, AdamW's moments in bf16 (V3 report section 3.3), emulated without FP8 units."""


class ParallelConfig(Settings):
    """How many processes training is spread over, by axis; the world's size is the product (V3 report section 3.2).

    Every other setting means the same on any layout: batch sizes are of the whole run.
    """

    pipeline: Positive = 1
    """Stages, each with some of the layers."""
    expert: Positive = 1
    """Parts that the routed experts are divided into; each also reads its own share of the batch."""
    shard: Positive = 1
    """Parts that optimizer state, and by ``zero`` gradients and weights, are divided into (times ``expert``, for all
    that is not an expert's)."""
    replicate: Positive = 1
    """Copies of all of that."""
    zero: Literal[1, 2, 3] = 1
    """What is divided: optimizer state (1), gradients too (2), weights too (3)."""
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    """The order of work in the pipeline."""
    layers: tuple[Natural, ...] | None = None
    """How many layers each stage of the pipeline has, in order; by default as operations tell, so that all take the
    same time. ``benthic bench stages`` measures what tells it better on a machine."""
    fp8_dispatch: bool = False
    """Send tokens to experts, and gradients back to them, in FP8; needs ``precision.compute = "fp8"``, whose results
    it leaves as they are."""
    hash_every: Natural = 0
    """Steps between comparisons of the weights that several processes hold; 0 makes none."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long processes wait for one another before they give up."""

    @property
    def processes(self) -> int:
        """All together."""
        return self.pipeline * self.data_ranks

    @property
    def data_ranks(self) -> int:
        """Processes, or pipelines, that each read a share of the batch."""
        return self.expert * self.shard * self.replicate


class InferenceConfig(Settings):
    """Defaults of ``generate`` and ``chat``."""

    max_new_tokens: Positive = 200
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_k: Natural = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class EvaluationConfig(Settings):
    """What ``benthic run`` measures of the model that each stage of training has led to. Always: bits per byte of
    what is held out, of text and of answers; how many drafts of the MTP modules are right; the problems of
    ``posttrain.rl`` that are held out; and where the context is extended, the use that is made of it.
    """

    tasks: tuple[str, ...] = ()
    """Task files besides."""
    prompts: tuple[str, ...] = ("Hi! How are you today?", "What do you do at weekends?", "Do you have a pet?")
    """What every model is asked, so that its likeliest answers can be laid side by side."""
    max_new_tokens: Positive = 60
    """Of these answers."""
    sequences: Positive = 24
    """Held-out sequences, of four times the pretrained length, that are read where the context is extended."""
    retrieval: Positive = 40
    """Facts, at each length, that are then to be found."""


class ServeConfig(Settings):
    """``benthic serve``: where it listens, who may ask, and how much. API keys are no settings: files are copied."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. One that others reach needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes any that is free, and says which."""
    models: dict[str, str] = Field(default_factory=dict)
    """Models by the name that requests give, each a directory; those of the command line come first."""
    api_key_file: str | None = None
    """A file with one API key a line."""
    public_without_key: bool = False
    """Listen on an address that others reach although there is no API key."""
    hosts: tuple[str, ...] = ()
    """Names that requests may call this server by, besides local ones; where some are given, no other is answered."""
    cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory of each model's latent cache."""
    precision: Literal["fp32", "bf16", "fp8", "int8", "int4"] | None = None
    """That weights are kept in for decoding; by default their own."""
    cache_precision: Literal["fp32", "bf16", "fp8"] | None = None
    """That latents are cached in; by default the type of the weights."""
    max_batch: Positive = 16
    """Requests that each model works on at once."""
    max_queue: Positive = 2048
    """Requests that may wait for each model; further ones are refused with 429."""
    max_tokens: Positive = 4096
    """Largest number of new tokens that a request may ask for."""
    max_body_mib: Annotated[float, Field(gt=0, le=1024)] = 4.0
    """Of one request."""
    max_connections: Positive = 4096
    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """From a request's arrival to its end, waiting included."""
    header_seconds: Annotated[float, Field(gt=0)] = 10.0
    """For the headers of a request to arrive."""
    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """For its body."""
    stall_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may leave unread what it is sent, before the connection is closed."""
    drain_seconds: Annotated[float, Field(ge=0)] = 60.0
    """After SIGTERM, for requests at work to finish."""
    grammar_seconds: Annotated[float, Field(gt=0)] = 2.0
    """To compile a JSON schema or regular expression."""
    log_requests: bool = True
    """A line for each request: method, path, status, duration. Never what it says."""
    log_prompts: bool = False
    """Also log what requests say."""


class RunConfig(Settings):
    """A recipe: everything ``benthic run`` needs to know."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    posttrain: PosttrainConfig = PosttrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: InferenceConfig = InferenceConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _sequences_fit_the_model(self) -> Self:
        length, limit = self.train.sequence_length, self.model.max_position_embeddings
        if length > limit:
            raise ValueError(f"train.sequence_length={length} must be at most model.max_position_embeddings={limit}")
        return self

    @model_validator(mode="after")
    def _answers_fit_the_model(self) -> Self:
        sft, limit = self.posttrain.sft, self.model.max_position_embeddings
        if self.train.extend and self.posttrain.base is None:
            longest = self.train.extend[-1].sequence_length
            limit = max(longest, self.model.rope_scaling.reach if self.model.rope_scaling else longest)
        if sft is not None and (sft.sequence_length or 0) > limit:
            raise ValueError(
                f"posttrain.sft.sequence_length={sft.sequence_length} must be at most {limit}, what the model reads"
            )
        return self

    @model_validator(mode="after")
    def _yarn_reaches_the_phases(self) -> Self:
        yarn = self.model.rope_scaling
        if yarn is None or not self.train.extend:
            return self
        length, original = self.train.sequence_length, yarn.original_max_position_embeddings
        if length > original:
            raise ValueError(
                f"train.sequence_length={length} must be at most {original}, "
                "model.rope_scaling.original_max_position_embeddings: pretraining comes before YaRN"
            )
        longest = self.train.extend[-1].sequence_length
        if longest > yarn.reach:
            raise ValueError(
                f"train.extend.{len(self.train.extend) - 1}.sequence_length={longest} must be at most {yarn.reach}, "
                f"model.rope_scaling.factor={yarn.factor:g} times original_max_position_embeddings={original}"
            )
        return self
