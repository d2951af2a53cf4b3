"""Reading a prompt in fp32 with products of our own beside the same by the BLAS, in turn, as shares of its peak.

    python benchmarks/prefill_vs_blas.py [PRESET] [--context 512] [--pairs 9]

On AMX tiles where there are such, else on vector units. Medians; the GEMM rate is measured before each pair.
"""

from functools import partial

import torch
from blas_pairs import print_pairs
from steps import script_parser

from benthic.config.presets import PRESETS
from benthic.lab.bench_inference import prefill_flops, prompt_reader
from benthic.model import build_model


@torch.inference_mode()
def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("preset", nargs="?", default="bench-400m", choices=PRESETS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    config = PRESETS[given.preset]
    read = prompt_reader(build_model(config), given.context)
    prompt = torch.randint(config.vocab_size, (given.context,)).tolist()
    print_pairs(partial(read, prompt), prefill_flops(config, given.context), given.context, given.pairs)


if __name__ == "__main__":
    main()
