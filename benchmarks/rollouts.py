"""Sampling many answers at once beside one at a time, with the sampler that learning from rewards uses.

    python benchmarks/rollouts.py [PRESET | RUN] [--at-once 64] [--tokens 48] [--prompt 24] [--repeats 5] [--json]

By default the model is the quickstart's, with random weights. Prompts are random, and no token ends an answer, so that
all have --tokens of them. Kinds alternate; shown are medians of tokens per second, and the median of their ratios. One
at a time a tenth of the answers is sampled, with one decoder for all, as at once.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from steps import script_parser, seconds_in_turns

from benthic.config.load import load_preset_or_recipe
from benthic.console import mistakes_in_one_line
from benthic.convert.resolve import load_model
from benthic.lab.compare import positive
from benthic.model import LanguageModel, build_model
from benthic.posttrain.rollouts import Sampler


def main(arguments: Sequence[str]) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", nargs="?", default="quickstart", help="a preset, a recipe or a run directory")
    parser.add_argument("--at-once", type=positive, default=64)
    parser.add_argument("--tokens", type=positive, default=48, help="of an answer")
    parser.add_argument("--prompt", type=positive, default=24, help="tokens of a prompt")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    found = measured(_model(given.model), given.at_once, given.prompt, given.tokens, given.repeats)
    if given.json:
        print(json.dumps(found))
    else:
        print(
            f"{given.at_once} at once: {found['at_once_tokens_per_s']:,.0f} tokens/s; one at a time: "
            f"{found['one_tokens_per_s']:,.0f}; ratio {found['ratio']:.1f}"
        )


def measured(model: LanguageModel, at_once: int, prompt: int, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second, at once and one at a time, and their ratio."""
    few = max(1, at_once // 10)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (at_once, prompt), generator=generator).tolist()

    def sampling(count: int, together: int) -> None:
        sampler = Sampler(model, [-1], at_once=together)
        answers = sampler.sample(prompts[:count], range(count), max_new_tokens=tokens)
        assert int((answers.end_N - answers.prompt_N).sum()) == count * tokens

    seconds = seconds_in_turns({"all": lambda: sampling(at_once, at_once), "one": lambda: sampling(few, 1)}, repeats)
    together, alone = (
        [count * tokens / one for one in seconds[kind]] for kind, count in (("all", at_once), ("one", few))
    )
    return {
        "at_once_tokens_per_s": statistics.median(together),
        "one_tokens_per_s": statistics.median(alone),
        "ratio": statistics.median(a / b for a, b in zip(together, alone, strict=True)),
    }


def _model(name: str) -> LanguageModel:
    if Path(name).is_dir():
        return load_model(name, torch.float32)[0]
    return build_model(load_preset_or_recipe(name).model)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
