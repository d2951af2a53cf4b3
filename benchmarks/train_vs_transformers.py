"""Training beside Hugging Face transformers: the same sizes, batch and optimizer, alternating in one process.

    pip install 'benthic[peers]'
    python benchmarks/train_vs_transformers.py [RECIPE] [KEY=VALUE ...]

A step is forward, loss, backward, clipping and AdamW in fp32 on random tokens, by default of the recipe ``bench``:
bench-108m, 8 sequences of 512. Steps alternate so that a busy moment falls on all. transformers is measured twice: as
it comes, which groups the experts' products, and with its eager attention and experts.
"""

import statistics
import sys

import torch
from steps import Step, ratio, seconds_in_turns, training_step
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.convert.config import config_to_hf
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops


def theirs(config: RunConfig, **implementation: str) -> Step:
    """The step of transformers' model with PyTorch's AdamW."""
    settings = config.train.optimizer
    sizes = config_to_hf(config.model, torch.float32, {})
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **implementation)).train()
    assert all(getattr(model.config, f"_{key}") == value for key, value in implementation.items())
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, settings.betas, fused=True)

    def step(tokens_BS: torch.Tensor) -> None:
        inputs, targets = tokens_BS[:, :-1], tokens_BS[:, 1:]
        logits = model(inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints tokens per second, share of the GEMM peak, and the ratios."""
    recipe, *overrides = sys.argv[1:] or ["bench"]
    config = load_run_config(recipe, [*overrides, "model.num_nextn_predict_layers=0"])  # the peer has no MTP
    eager = theirs(config, attn_implementation="eager", experts_implementation="eager")
    steps = {"benthic": training_step(config), "transformers": theirs(config), "eager": eager}
    times = seconds_in_turns(steps, config, config.train.steps or 5)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    gemm_gflops = measure_gemm_gflops()
    gflops = training_flops(config.model, config.train.sequence_length) / 1e9
    tokens = config.train.batch_size * config.train.sequence_length
    for name, time_of_step in seconds.items():
        speed = tokens / time_of_step
        print(f"{name:12}  {speed:8,.0f} tokens/s  {speed * gflops / gemm_gflops:6.1%} of {gemm_gflops:.0f} GFLOP/s")
    for name in ("transformers", "eager"):
        print(f"{ratio(times[name], times['benthic']):8.2f} times {name}")


if __name__ == "__main__":
    main()
