"""Parameters of a model by part, from its config alone: what a run will weigh before anything is built.

The tests hold these formulas against the modules themselves, and against the published 671B, 37B and 11.5B.
"""

from dataclasses import asdict, dataclass, replace

from benthic.config.schema import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Parameters by part. The selection bias is a buffer and not among them."""

    embedding: int = 0
    attention: int = 0
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    projection: int = 0
    """Of MTP modules only: joins hidden state and embedding."""
    head: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())


def main_model(config: ModelConfig) -> Counts:
    """The transformer without MTP modules."""
    vocabulary = config.vocab_size * config.hidden_size
    dense_layers = config.first_k_dense_replace
    dense = replace(_attention_and_norms(config), dense_ffn=3 * config.hidden_size * config.intermediate_size)
    return _add(
        Counts(embedding=vocabulary, norms=config.hidden_size, head=vocabulary),
        _times(dense, dense_layers),
        _times(_moe_layer(config), config.num_hidden_layers - dense_layers),
    )


def mtp_modules(config: ModelConfig) -> Counts:
    """What the MTP modules add: their embedding and head are the main model's (V3 report section 2.2)."""
    width = config.hidden_size
    module = _add(Counts(projection=2 * width * width, norms=3 * width), _moe_layer(config))
    return _times(module, config.num_nextn_predict_layers)


def activated(counts: Counts, config: ModelConfig) -> Counts:
    """The part of ``counts`` that one token passes through: of the routed experts only those it chose."""
    chosen = counts.routed_experts // config.n_routed_experts * config.num_experts_per_tok
    return replace(counts, routed_experts=chosen)


def _moe_layer(config: ModelConfig) -> Counts:
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return replace(
        _attention_and_norms(config),
        routed_experts=config.n_routed_experts * expert,
        shared_experts=config.n_shared_experts * expert,
        router=config.n_routed_experts * config.hidden_size,
    )


def _attention_and_norms(config: ModelConfig) -> Counts:
    width, heads = config.hidden_size, config.num_attention_heads
    query_in, rank = heads * config.qk_head_dim, config.q_lora_rank
    query = width * query_in if rank is None else rank * (width + query_in)
    key_value = width * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * width
    return Counts(attention=query + key_value + output, norms=2 * width + (rank or 0) + config.kv_lora_rank)


def _times(counts: Counts, factor: int) -> Counts:
    return Counts(**{part: number * factor for part, number in asdict(counts).items()})


def _add(*terms: Counts) -> Counts:
    columns = [asdict(term) for term in terms]
    return Counts(**{part: sum(column[part] for column in columns) for part in columns[0]})
