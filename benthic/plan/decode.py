"""Memory a decode step must read: its limit, since at small batches every weight read serves few products."""

from benthic.config.schema import ModelConfig
from benthic.plan.counts import main_model
from benthic.plan.flops import cache_bytes_per_token
from benthic.precision.latents import CachePrecision
from benthic.precision.quantise import Precision, head_precision
from benthic.precision.quantise import bytes_per_number as matrix_bytes


def decode_bytes(
    config: ModelConfig, context: int, batch: int = 1, *, bytes_per_number: int = 4,
    precision: Precision | None = None, cache_precision: CachePrecision | None = None,
) -> float:  # fmt: skip
    """Bytes of one step that appends a token to each of ``batch`` sequences of ``context`` tokens.

    Each weight that any sequence needs is read once: a row of the embedding for each sequence, all of attention,
    dense and shared experts, router, norms and head, and of the routed experts as many as uniform routing is
    expected to choose. Each sequence's own cache is read once.

    Args:
        bytes_per_number: of all weights and of the cache.
        precision: in which attention, feed-forward layers and head are kept, if they differ from that.
        cache_precision: in which latents are cached, if that differs.
    """
    main = main_model(config)
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    experts = main.routed_experts * (1 - missed) + main.shared_experts
    matrices, head, rest = (
        main.attention + main.dense_ffn + experts,
        main.head,
        main.router + main.norms + batch * config.hidden_size,
    )
    of_matrices = matrix_bytes(precision) if precision else bytes_per_number
    of_head = matrix_bytes(head_precision(precision)) if precision else bytes_per_number
    weights = matrices * of_matrices + head * of_head + rest * bytes_per_number
    cache = config.num_hidden_layers * config.latent_dim * bytes_per_number
    if cache_precision:
        cache = cache_bytes_per_token(config, cache_precision)
    return weights + batch * context * cache
