"""Training beside Hugging Face transformers: the same sizes, batch and optimizer, alternating in one process.

    pip install 'benthic[peers]'
    python benchmarks/train_vs_transformers.py [RECIPE] [KEY=VALUE ...]

A step is forward, loss, backward, clipping and AdamW in fp32 on random tokens, by default of the recipe ``bench``:
bench-108m, 8 sequences of 512. Steps alternate so that a busy moment falls on both.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.convert.config import config_to_hf
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.recompute import recompute_activations
from benthic.train.schedule import Course
from benthic.train.step import train_step

WARMUP_STEPS = 2
Step = Callable[[torch.Tensor], None]


def ours(config: RunConfig) -> Step:
    """Benthic's training step."""
    model = build_model(config.model)
    if config.train.recompute:
        recompute_activations(model)
    objective = Objective(model)
    optimizer = ModelOptimizer(objective.model, config.train.optimizer)
    settings = Course(config.train.schedule, 100, config.train.batch_size).at(50)

    def step(tokens_BS: torch.Tensor) -> None:
        train_step(
            objective, optimizer, Batch(tokens_BS, None), settings,
            micro_batch_size=config.train.batch_size, compute="fp32",
        )  # fmt: skip

    return step


def theirs(config: RunConfig) -> Step:
    """The step of transformers' model with PyTorch's AdamW."""
    settings = config.train.optimizer
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_hf(config.model, torch.float32, {}))).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, settings.betas, fused=True)

    def step(tokens_BS: torch.Tensor) -> None:
        inputs, targets = tokens_BS[:, :-1], tokens_BS[:, 1:]
        logits = model(inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def median_seconds(steps: dict[str, Step], config: RunConfig, repeats: int) -> dict[str, float]:
    """Median time of each step over batches that all of them see, after warming up."""
    train = config.train
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARMUP_STEPS + repeats):
        tokens_BS = torch.randint(config.model.vocab_size, (train.batch_size, train.sequence_length + 1))
        for name, step in steps.items():
            start = time.perf_counter()
            step(tokens_BS)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[WARMUP_STEPS:]) for name, times in seconds.items()}


def main() -> None:
    """Prints tokens per second, share of the GEMM peak, and the ratio."""
    recipe, *overrides = sys.argv[1:] or ["bench"]
    config = load_run_config(recipe, [*overrides, "model.num_nextn_predict_layers=0"])  # the peer has no MTP
    seconds = median_seconds({"benthic": ours(config), "transformers": theirs(config)}, config, config.train.steps or 5)
    gemm_gflops = measure_gemm_gflops()
    gflops = training_flops(config.model, config.train.sequence_length) / 1e9
    tokens = config.train.batch_size * config.train.sequence_length
    for name, time_of_step in seconds.items():
        speed = tokens / time_of_step
        print(f"{name:12}  {speed:8,.0f} tokens/s  {speed * gflops / gemm_gflops:6.1%} of {gemm_gflops:.0f} GFLOP/s")
    print(f"{'ratio':12}  {seconds['transformers'] / seconds['benthic']:8.2f}")


if __name__ == "__main__":
    main()
