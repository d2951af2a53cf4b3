"""Training beside Hugging Face transformers: the same sizes, batch and optimizer, alternating in one process.

    pip install 'benthic[peers]'
    python benchmarks/train_vs_transformers.py [RECIPE] [KEY=VALUE ...]

A step is forward, loss, backward, clipping and AdamW on random tokens, by default of the recipe ``bench``: bench-108m,
8 sequences of 512, in fp32; ``precision.compute=bf16`` puts both in bf16. Steps alternate so that a busy moment falls
on all. transformers is measured twice: as it comes, which groups the experts' products, and with its eager attention
and experts.
"""

import statistics

from steps import compute_of, config_of, ratio, recipe_parser, seconds_in_turns, training_step
from transformers_peer import WITHOUT_MTP, peer_step

from benthic.console import mistakes_in_one_line
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import compute_dtype


def main() -> None:
    """Prints tokens per second, share of the GEMM peak, and the ratios."""
    config = config_of(recipe_parser(__doc__).parse_args(), WITHOUT_MTP)
    eager = peer_step(config, attn_implementation="eager", experts_implementation="eager")
    steps = {"benthic": training_step(config), "transformers": peer_step(config), "eager": eager}
    times = seconds_in_turns(steps, config.train.steps or 5)
    gemm_gflops = measure_gemm_gflops(compute_dtype(compute_of(config)))
    gflops = training_flops(config.model, config.train.sequence_length) / 1e9
    tokens = config.train.batch_size * config.train.sequence_length
    for name, seconds in times.items():
        speed = tokens / statistics.median(seconds)
        share = speed * gflops / gemm_gflops
        print(f"{name:12}  {speed:8,.0f} tokens/s  {share:6.1%} of {gemm_gflops:.0f} GFLOP/s in {compute_of(config)}")
    for name in ("transformers", "eager"):
        print(f"{ratio(times[name], times['benthic']):8.2f} times {name}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
