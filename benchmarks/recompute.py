"""What recomputing activations costs in time (`train.recompute`): steps with and without it in turns.

    python benchmarks/recompute.py [RECIPE] [KEY=VALUE ...]

By default the recipe ``bench``. What it saves is measured by ``memory_vs_transformers.py``, in processes of their own.
"""

import statistics

from steps import compute_of, config_of, ratio, recipe_parser, seconds_in_turns, training_step

from benthic.console import mistakes_in_one_line
from benthic.train.memory import settle_memory


def main() -> None:
    given = recipe_parser(__doc__).parse_args()
    configs = {
        "kept": config_of(given, "train.recompute=false"),
        "recomputed": config_of(given, "train.recompute=true"),
    }
    settle_memory()
    steps = {name: training_step(config) for name, config in configs.items()}
    seconds = seconds_in_turns(steps, configs["kept"].train.steps or 20)
    for name, times in seconds.items():
        print(f"{name:12}  {statistics.median(times):8.3f} s a step in {compute_of(configs[name])}")
    print(f"{'ratio':12}  {ratio(seconds['recomputed'], seconds['kept']):8.3f}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
