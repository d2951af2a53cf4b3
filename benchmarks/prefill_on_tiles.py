"""Reading a prompt on AMX tiles beside reading it by the BLAS, in turn in one process, as shares of the GEMM peak.

    python benchmarks/prefill_on_tiles.py [PRESET] [--context 512] [--pairs 9]

Medians; the GEMM rate is measured before each pair.
"""

from functools import partial

import torch
from steps import script_parser
from tile_pairs import print_pairs

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
