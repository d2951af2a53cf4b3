"""What recomputing activations costs in time (`train.recompute`): steps with and without it in turns.

    python benchmarks/recompute.py [RECIPE] [KEY=VALUE ...]

By default the recipe ``bench``. What it saves is measured by ``memory_vs_transformers.py``, in processes of their own.
"""

import statistics
import sys

from steps import ratio, seconds_in_turns, training_step

from benthic.config.load import load_run_config
from benthic.train.memory import settle_memory


def main() -> None:
    recipe, *overrides = sys.argv[1:] or ["bench"]
    configs = {
        "kept": load_run_config(recipe, [*overrides, "train.recompute=false"]),
        "recomputed": load_run_config(recipe, [*overrides, "train.recompute=true"]),
    }
    config = configs["kept"]
    compute = "fp32" if config.precision.compute == "auto" else config.precision.compute
    settle_memory()
    steps = {name: training_step(each, compute) for name, each in configs.items()}
    seconds = seconds_in_turns(steps, config, config.train.steps or 20)
    for name, times in seconds.items():
        print(f"{name:12}  {statistics.median(times):8.3f} s a step in {compute}")
    print(f"{'ratio':12}  {ratio(seconds['recomputed'], seconds['kept']):8.3f}")


if __name__ == "__main__":
    main()
