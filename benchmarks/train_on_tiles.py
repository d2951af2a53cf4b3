"""Training steps in fp32 on AMX tiles beside the same by the BLAS, in turn in one process, as shares of the GEMM peak.

    python benchmarks/train_on_tiles.py [RECIPE] [KEY=VALUE ...] [--pairs 5]

By default of the recipe ``bench``: bench-108m, 8 sequences of 512. Medians; the GEMM rate is measured before each pair.
"""

from steps import config_of, recipe_parser, training_step
from tile_pairs import print_pairs

from benthic.console import mistakes_in_one_line
from benthic.plan.flops import training_flops
from benthic.train.memory import settle_memory
from benthic.train.trial import heaviest_mtp


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    config = config_of(given, "precision.compute=fp32-tiles")
    train = config.train
    settle_memory()
    tokens = train.batch_size * train.sequence_length
    flops = tokens * training_flops(config.model, train.sequence_length, mtp=heaviest_mtp(config) > 0)
    print_pairs(training_step(config), flops, tokens, given.pairs)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
