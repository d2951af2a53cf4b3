"""What drafts of the MTP modules give: greedy decoding at batch 1, by how many tokens may be drafted ahead.

    benthic run quickstart --out runs/quickstart
    python benchmarks/drafts.py runs/quickstart [--most 3] [--tokens 200] [--prompts 4] [--precision int8] [--json]

For each limit from 0, no drafts, to --most there is one engine (`benthic.Engine`, `max_draft`), which drafts up to that
limit where it finds that to pay. Each completes the beginnings of the run's held-out documents, one at a time. Engines
alternate; after a round that does not count come five, and medians of tokens per second are shown: tokens after the
first, over the time from the first to the last. Drafts must not change the text: if they do, the script says so and
ends with status 1.

Drafted and accepted are tokens, of 100 generated in all five rounds; the share of drafts accepted stands beside them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from steps import script_parser

import benthic
from benthic.console import mistakes_in_one_line
from benthic.data.shards import TokenStore
from benthic.errors import InputError, WorkFailed
from benthic.inference.request import Completion
from benthic.lab.compare import positive
from benthic.precision.quantise import PRECISIONS

ROUNDS = 5
PROMPT_TOKENS = 16
Round = list[Completion]
"""What became of each prompt."""


@dataclass(frozen=True)
class Line:
    """What an engine did."""

    max_draft: int
    tokens_per_s: float
    over_none: float
    """Times as fast as without drafts, as the median over rounds."""
    drafted_per_100: float
    accepted_per_100: float
    acceptance: float | None
    """Share of drafts accepted; None if there were none."""


def main(arguments: Sequence[str]) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--most", type=positive, default=3, help="drafts that the last engine may make ahead")
    parser.add_argument("--tokens", type=positive, default=200, help="that follow each prompt")
    parser.add_argument("--prompts", type=positive, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, help="that weights are kept in, by default their own")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    prompts = beginnings(given.run, given.prompts)
    engines = [
        benthic.Engine(given.run, max_draft=most, max_batch=1, precision=given.precision)
        for most in range(given.most + 1)
    ]
    check(given, engines[0], prompts)
    rounds = alternate(engines, prompts, given.tokens)
    lines = [line(most, each, rounds[0]) for most, each in enumerate(rounds)]
    if given.json:
        print(json.dumps([asdict(each) for each in lines], indent=2))
    else:
        show(engines[0], lines)


def beginnings(run: Path, count: int) -> list[list[int]]:
    """The first tokens of so many held-out documents."""
    if not (run / "data").is_dir():
        raise InputError(
            f"{run}: holds no data/ to take prompts from; give the directory of a run that was trained here"
        )
    store = TokenStore(run / "data", "val")
    starts = [0, *store.document_ends_D[:-1].tolist()][:count]
    return [store.take(np.arange(start, min(start + PROMPT_TOKENS, store.tokens))).tolist() for start in starts]


def check(given: argparse.Namespace, engine: benthic.Engine, prompts: list[list[int]]) -> None:
    """Refuse what would measure nothing."""
    if not len(engine.model.mtp):
        raise InputError(f"{given.run}: its model has no MTP modules to draft with")
    room = engine.config.max_position_embeddings - max(map(len, prompts))
    if not 2 <= given.tokens <= room:
        raise InputError(f"--tokens {given.tokens}: must be from 2 to {room}, what the model's context has room for")


def alternate(engines: list[benthic.Engine], prompts: list[list[int]], tokens: int) -> list[list[Round]]:
    """Rounds of each engine, in turn, without the first."""
    rounds: list[list[Round]] = [[] for _ in engines]
    for _ in range(1 + ROUNDS):
        for most, engine in enumerate(engines):
            rounds[most].append(complete(engine, prompts, tokens))
            refuse_other_text(most, rounds[most][-1], rounds[0][-1])
    return [each[1:] for each in rounds]


def complete(engine: benthic.Engine, prompts: list[list[int]], tokens: int) -> Round:
    """One prompt after another, all of the same length, whatever the model would have ended."""
    return [engine.generate([prompt], temperature=0.0, max_new_tokens=tokens, ignore_eos=True)[0] for prompt in prompts]


def refuse_other_text(most: int, found: Round, expected: Round) -> None:
    """Raise WorkFailed if drafts have changed a text."""
    for number, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        if ours.token_ids != plain.token_ids:
            raise WorkFailed(f"prompt {number}: with max_draft={most} another text follows than without drafts")


def line(most: int, rounds: list[Round], plain: list[Round]) -> Line:
    """An engine's figures; ``plain`` are the rounds without drafts."""
    all_of_them = [completion for each in rounds for completion in each]
    drafted, accepted, tokens = (
        sum(count(completion) for completion in all_of_them)
        for count in (lambda c: c.drafted_tokens, lambda c: c.accepted_tokens, lambda c: len(c.token_ids))
    )
    return Line(
        max_draft=most,
        tokens_per_s=statistics.median(map(speed, rounds)),
        over_none=statistics.median(speed(ours) / speed(theirs) for ours, theirs in zip(rounds, plain, strict=True)),
        drafted_per_100=100 * drafted / tokens,
        accepted_per_100=100 * accepted / tokens,
        acceptance=accepted / drafted if drafted else None,
    )


def speed(completions: Round) -> float:
    """Tokens per second of decoding: the first token belongs to reading the prompt."""
    seconds = sum(each.total_s - each.first_token_s for each in completions if each.first_token_s is not None)
    return sum(len(completion.token_ids) - 1 for completion in completions) / seconds


def show(engine: benthic.Engine, lines: list[Line]) -> None:
    print(f"{engine.stats().decoder}, {torch.get_num_threads()} threads, batch 1, greedy, medians of {ROUNDS}")
    print(f"{'max_draft':>9}{'tok/s':>10}{'of 0':>7}{'drafted':>9}{'accepted':>10}{'share':>8}")
    for each in lines:
        share = "-" if each.acceptance is None else f"{each.acceptance:.0%}"
        print(
            f"{each.max_draft:>9}{each.tokens_per_s:>10,.0f}{each.over_none:>7.2f}{each.drafted_per_100:>9.1f}"
            f"{each.accepted_per_100:>10.1f}{share:>8}"
        )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
