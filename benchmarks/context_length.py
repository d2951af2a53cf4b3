"""Does a model whose context was extended use the text beyond its old length? Bits per byte of held-out text, by stage.

    benthic run extend --out runs/extend
    python benchmarks/context_length.py runs/extend

The first table is by position: how well tokens are predicted that far into a sequence. Other positions hold other
tokens, so the second is of the same tokens throughout, the last of each sequence, with more or less text before them.
"""

import itertools
from pathlib import Path

import torch
from steps import script_parser
from torch import Tensor

from benthic.config.load import load_run_config
from benthic.config.stages import stages
from benthic.console import mistakes_in_one_line
from benthic.convert.resolve import load_checkpoint
from benthic.data.batches import validation_batches
from benthic.data.shards import TokenStore
from benthic.errors import InputError
from benthic.evaluate.by_position import nats_by_position
from benthic.train import checkpoint


def held_out(store: TokenStore, length: int, count: int) -> Tensor:
    batches = validation_batches(store, 1, length, max_tokens=count * length)
    # The last may be a shorter one.
    whole = [batch.tokens_BS for batch in batches if batch.tokens_BS.shape[1] == length + 1]
    if not whole:
        raise InputError(f"the held-out text has {store.tokens} tokens, not one sequence of {length}")
    return torch.cat(whole)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences of the longest stage's length")
    arguments = parser.parse_args()
    run: Path = arguments.run
    whole = stages(load_run_config(run / "config.toml"))
    lengths = [stage.config.train.sequence_length for stage in whole]
    store = TokenStore(run / "data", "val")
    tokens_BS = held_out(store, lengths[-1], arguments.sequences)
    last = lengths[0] // 2
    per_byte = store.tokens / store.manifest.val.bytes / torch.log(torch.tensor(2.0)).item()
    cases = {stage.name: (checkpoint.latest(run / "checkpoints" / stage.name), stage.config.model) for stage in whole}
    if len(whole) > 1:
        cases["pretrain, YaRN untrained"] = (cases["pretrain"][0], whole[-1].config.model)
    print(f"{len(tokens_BS)} sequences of {lengths[-1]} tokens; bits per byte")
    buckets = list(itertools.pairwise([0, *lengths]))
    columns = "  ".join(f"{f'{low}-{high}':>10}" for low, high in buckets)
    contexts = "  ".join(f"{f'of {length}':>8}" for length in lengths)
    print(f"{'':25}  by position: {columns}  |  last {last} tokens: {contexts}")
    for name, (path, config) in cases.items():
        if path is None:
            continue
        model, _ = load_checkpoint(config, path)
        nats = {length: nats_by_position(model, [tokens_BS[:, -length - 1 :]]) for length in lengths}
        by_position = [float(nats[lengths[-1]][low:high].mean()) * per_byte for low, high in buckets]
        left = "  ".join(f"{value:10.4f}" for value in by_position)
        right = "  ".join(f"{float(nats[length][-last:].mean()) * per_byte:8.4f}" for length in lengths)
        print(f"{name:25}               {left}  |                   {right}", flush=True)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
