"""Whether cost grows linearly: steps of a model with twice the layers, or with four times the experts, in turns.

    python benchmarks/scaling.py layers|experts [RECIPE] [KEY=VALUE ...]

By default the recipe ``bench``, 8 sequences of 512. ``layers`` compares the tokens per second at twice the layers with
half of those at once the layers (bar: at least 0.95). ``experts`` compares the time of a step at 64 routed experts with
that at 16, as many chosen by a token and as wide in both (bar: at most 1.10).
"""

import statistics
import sys

from steps import ratio, seconds_in_turns, training_step

from benthic.config.load import load_run_config
from benthic.train.memory import settle_memory


def main() -> None:
    what, recipe, *overrides = [*sys.argv[1:], "bench"] if len(sys.argv) == 2 else sys.argv[1:]
    config = load_run_config(recipe, overrides)
    layers = config.model.num_hidden_layers
    changes = {
        "layers": {
            f"{layers} layers": f"model.num_hidden_layers={layers}",
            f"{2 * layers} layers": f"model.num_hidden_layers={2 * layers}",
        },
        "experts": {f"{count} experts": f"model.n_routed_experts={count}" for count in (16, 64)},
    }[what]
    compute = "fp32" if config.precision.compute == "auto" else config.precision.compute
    settle_memory()
    steps = {
        name: training_step(load_run_config(recipe, [*overrides, change]), compute) for name, change in changes.items()
    }
    seconds = seconds_in_turns(steps, config, config.train.steps or 10)
    tokens = config.train.batch_size * config.train.sequence_length
    for name, times in seconds.items():
        print(f"{name:12}  {tokens / statistics.median(times):8,.0f} tokens/s")
    small, large = seconds.values()
    if what == "layers":
        print(f"tokens/s at twice the layers, of half: {2 / ratio(large, small):.3f}")
    else:
        print(f"time of a step with 64 experts, of that with 16: {ratio(large, small):.3f}")


if __name__ == "__main__":
    main()
