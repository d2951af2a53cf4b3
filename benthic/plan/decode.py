"""Memory a decode step must read: its limit, since at small batches every weight read serves few products."""

from benthic.config.schema import ModelConfig
from benthic.plan.counts import activated, main_model
from benthic.plan.flops import cache_bytes_per_token


def decode_bytes(config: ModelConfig, context: int, batch: int = 1, *, bytes_per_number: int = 4) -> float:
    """Bytes of one step that appends a token to each of ``batch`` sequences of ``context`` tokens.

    Each weight that any sequence needs is read once: a row of the embedding for each sequence, all of attention,
    dense and shared experts, router, norms and head, and of the routed experts as many as uniform routing is
    expected to choose. Each sequence's own cache is read once.
    """
    main = main_model(config)
    per_token = activated(main, config)
    everywhere = per_token.total - per_token.embedding - per_token.routed_experts
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    weights = everywhere + batch * config.hidden_size + main.routed_experts * (1 - missed)
    return weights * bytes_per_number + batch * context * cache_bytes_per_token(config, bytes_per_number)
