"""Training with products of our own beside the same by the BLAS, step by step in turn, as shares of its peak.

    python benchmarks/train_vs_blas.py [RECIPE] [KEY=VALUE ...] [--bf16] [--pairs 5]

By default of the recipe ``bench``: bench-108m, 8 sequences of 512. In fp32, on AMX tiles where there are such, else on
vector units. Medians; the GEMM rate is measured before each pair.
"""

from blas_pairs import print_pairs
from steps import compute_of, config_of, recipe_parser, training_step

from benthic.console import mistakes_in_one_line
from benthic.ops import native
from benthic.plan.flops import training_flops
from benthic.precision.compute import compute_dtype
from benthic.train.memory import settle_memory
from benthic.train.trial import heaviest_mtp


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="in bf16 instead of fp32")
    given = parser.parse_args()
    fp32 = "fp32-tiles" if native.has_tiles() else "fp32"
    config = config_of(given, f"precision.compute={'bf16' if given.bf16 else fp32}")
    train = config.train
    settle_memory()
    tokens = train.batch_size * train.sequence_length
    flops = tokens * training_flops(config.model, train.sequence_length, mtp=heaviest_mtp(config) > 0)
    print_pairs(training_step(config), flops, tokens, given.pairs, compute_dtype(compute_of(config)))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
