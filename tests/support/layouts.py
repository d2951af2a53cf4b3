"""Layouts of a small model over so many processes, for tests of checkpoints."""

from itertools import product
from typing import Any

from benthic.parallel.schedules import KINDS

MODEL = {
    "vocab_size": 50, "hidden_size": 20, "num_hidden_layers": 6, "first_k_dense_replace": 1, "intermediate_size": 28,
    "num_attention_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 8, "moe_intermediate_size": 9, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
"""Sizes of which many are no multiples of the numbers of shards."""


def layouts_of(world: int) -> list[dict[str, Any]]:
    """All ways to spread it over so many processes, with a schedule of every shape where there are stages."""
    sizes = [axes for axes in product(range(1, world + 1), repeat=4) if axes[0] * axes[1] * axes[2] * axes[3] == world]
    return [
        {
            "pipeline": pipeline,
            "expert": expert,
            "shard": shard,
            "replicate": replicate,
            "schedule": schedule,
            "zero": 3 if shard > expert else 1,
        }
        for pipeline, expert, shard, replicate in sizes
        for schedule in (_SCHEDULES if pipeline > 1 else ["1f1b"])
        if pipeline * KINDS[schedule].stages_per_rank <= MODEL["num_hidden_layers"] + 2
    ]


_SCHEDULES = ["1f1b", "interleaved", "zbv"]
