"""Whether cost grows linearly: steps of a model with twice the layers, or with four times the experts, in turns.

    python benchmarks/scaling.py layers|experts [RECIPE] [KEY=VALUE ...]

By default the recipe ``bench``, 8 sequences of 512. ``layers`` compares the tokens per second at twice the layers with
half of those at once the layers (bar: at least 0.95). ``experts`` compares the time of a step at 64 routed experts with
that at 16, as many chosen by a token and as wide in both (bar: at most 1.10).
"""

import statistics

from steps import config_of, ratio, recipe_parser, seconds_in_turns, training_step

from benthic.console import mistakes_in_one_line
from benthic.train.memory import settle_memory


def main() -> None:
    given = recipe_parser(__doc__, choose=("layers", "experts")).parse_args()
    layers = config_of(given).model.num_hidden_layers
    key, small, large = {
        "layers": ("num_hidden_layers", layers, 2 * layers),
        "experts": ("n_routed_experts", 16, 64),
    }[given.what]
    configs = {f"{count} {given.what}": config_of(given, f"model.{key}={count}") for count in (small, large)}
    settle_memory()
    steps = {name: training_step(config) for name, config in configs.items()}
    train = next(iter(configs.values())).train
    seconds = seconds_in_turns(steps, train.steps or 10)
    for name, times in seconds.items():
        print(f"{name:12}  {train.batch_size * train.sequence_length / statistics.median(times):8,.0f} tokens/s")
    growth = ratio(*reversed(seconds.values()))
    if given.what == "layers":
        print(f"tokens/s at twice the layers, of half: {2 / growth:.3f}")
    else:
        print(f"time of a step with 64 experts, of that with 16: {growth:.3f}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
