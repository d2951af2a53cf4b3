"""The plan of a model in one object: the first half of what ``benthic.plan`` returns and ``benthic plan`` prints."""

from dataclasses import asdict, dataclass

from benthic.config.schema import RunConfig
from benthic.plan.counts import activated, main_model, mtp_modules
from benthic.plan.flops import cache_bytes_per_token, forward_flops, training_flops


@dataclass(frozen=True)
class Plan:
    """Parameters, arithmetic and cache of a model."""

    total_parameters: int
    """Of the main model, without MTP modules."""
    active_parameters: int
    """Those one token passes through, embedding and head counted."""
    active_parameters_without_embedding: int
    parameters: dict[str, int]
    """``total_parameters`` by part."""
    mtp_parameters: int
    """What MTP modules add; their embedding and head are the main model's."""
    mtp_active_parameters: int
    """Those one token passes through in the MTP modules, shared embedding and head counted once for each."""
    kv_bytes_per_token: int
    """Latent cache in bf16, over all layers."""
    sequence_length: int
    forward_flops_per_token: float
    """Main model, causal attention, on average over a sequence of ``sequence_length``."""
    training_flops_per_token: float
    training_flops_per_token_non_causal: float
    """As some publications count: every token attends to the whole sequence."""
    training_flops_per_token_with_mtp: float


def plan_model(config: RunConfig) -> Plan:
    """Parameters by part, active parameters, FLOPs and cache bytes per token of a recipe's model."""
    model, length = config.model, config.train.sequence_length
    main, mtp = main_model(model), mtp_modules(model)
    active = activated(main, model)
    shared = model.num_nextn_predict_layers * (main.embedding + main.head)
    return Plan(
        total_parameters=main.total,
        active_parameters=active.total,
        active_parameters_without_embedding=active.total - main.embedding,
        parameters={part: number for part, number in asdict(main).items() if number},
        mtp_parameters=mtp.total,
        mtp_active_parameters=activated(mtp, model).total + shared,
        kv_bytes_per_token=cache_bytes_per_token(model),
        sequence_length=length,
        forward_flops_per_token=forward_flops(model, length),
        training_flops_per_token=training_flops(model, length),
        training_flops_per_token_non_causal=training_flops(model, length, causal=False),
        training_flops_per_token_with_mtp=training_flops(model, length, mtp=True),
    )
