"""The model card, ``README.md`` of an exported model: what it is, how it came about, how good it is, what is unknown.

Names and samples come from anywhere and are written so that no Markdown reader takes them for more than text. Of
sources only file names are told: a card travels further than a run.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from benthic.evaluate.records import EvaluationRecord, Sampled
from benthic.evaluate.score import Score
from benthic.plan.counts import activated, main_model
from benthic.report.facts import Facts, number
from benthic.report.words import clean, figure, hours, large
from benthic.version import VERSION

FILE_NAME = "README.md"
_MOST_SAMPLES = 3
_MOST_SOURCES = 20
_SEAL = "<!-- written by benthic export, sha256 {} -->\n"
_SEALED = re.compile(r"(.*\n)<!-- written by benthic export, sha256 ([0-9a-f]{64}) -->\n", re.DOTALL)
_MEANS_SOMETHING = re.compile(r"([\\`*_\[\]<>|&~#!$:@{}^=]|(?<=www)\.)")
_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [benthic, deepseek_v3, mixture-of-experts]
---
"""


def model_card(facts: Facts) -> str:
    """The card of the model that a run has come to; the same facts give the same bytes."""
    name = clean(facts.run.resolve().name)
    paragraphs = [
        f"# {_text(name)}",
        "A language model in DeepSeek-V3's architecture (multi-head latent attention, mixture of experts, multi-token "
        f"prediction), written by Benthic {VERSION}. Nobody has checked by hand what it says: it may be wrong, and "
        "repeats what it was trained on.",
        *_sizes(facts),
        "## Use",
        _USE,
        "## Training",
        *_training(facts),
        "## Evaluation",
        *_evaluation(list(facts.records.values())),
        "## Data",
        *_data(facts),
        "## Cost",
        _cost(facts),
    ]
    body = _FRONT + "\n" + "\n\n".join(paragraphs) + "\n\n"
    return body + _SEAL.format(_digest(body))


def is_untouched(text: str) -> bool:
    """Whether this is a card as it was written, with nothing of anybody else's in it."""
    found = _SEALED.fullmatch(text)
    return found is not None and _digest(found[1]) == found[2]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```

`benthic chat PATH` talks to it, `benthic serve PATH` serves it."""


def _sizes(facts: Facts) -> Iterator[str]:
    if (model := facts.model) is None:
        return
    main = main_model(model)
    rows = [
        ("parameters", large(main.total)),
        ("used by a token", large(activated(main, model).total)),
        ("layers", f"{model.num_hidden_layers}, of which {model.first_k_dense_replace} dense"),
        ("experts", f"{model.n_routed_experts}, {model.num_experts_per_tok} a token, {model.n_shared_experts} shared"),
        ("MTP modules", str(model.num_nextn_predict_layers)),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_position_embeddings:,} tokens"),
    ]
    yield _table(("", ""), rows)


def _training(facts: Facts) -> Iterator[str]:
    if facts.brought:
        yield f"It began with the weights of {_file(facts.brought.get('base', 'an unnamed model'))}."
    if not facts.progress:
        yield "How it was trained is not recorded where it was exported from."
        return
    rows = [(_text(one.name), one.state, f"{one.done:,}" if one.done else "") for one in facts.progress]
    yield _table(("stage", "state", "steps"), rows)
    every = [one for several in facts.made_with.values() for one in several]
    used = sorted({f"Benthic {one.get('benthic')}, PyTorch {one.get('torch')}" for one in every})
    yield f"Computed with {_text('; '.join(used))}." if used else "Versions were not recorded when it was trained."


def _evaluation(records: Sequence[EvaluationRecord]) -> Iterator[str]:
    if not any(record.scores for record in records):
        yield "Not measured."
        return
    names = dict.fromkeys(name for record in records for name in record.scores)
    head = ("measured", *(f"after {_text(record.stage)}" for record in records))
    rows = [
        (f"{_text(name)} ({_text(next(one.scores[name].metric for one in records if name in one.scores))})",
         *(_score(record.scores.get(name)) for record in records))
        for name in names
    ]  # fmt: skip
    yield _table(head, rows)
    yield "In brackets: 95% interval, and how many pieces were measured."
    if left_out := [f"{_text(what)} ({_text(why)})" for what, why in records[-1].not_measured.items()]:
        yield f"Not measured: {'; '.join(left_out)}."
    for sample in records[-1].samples[:_MOST_SAMPLES]:
        yield _sample(sample)


def _score(score: Score | None) -> str:
    if score is None:
        return "not measured"
    interval = f"{figure(score.ci95[0])} to {figure(score.ci95[1])}, " if score.ci95 else ""
    return f"{figure(score.value)} ({interval}{score.n:,})"


def _sample(sample: Sampled) -> str:
    return f"Asked:\n\n{_block(sample.prompt)}\n\nit answered:\n\n{_block(sample.answer)}"


def _data(facts: Facts) -> Iterator[str]:
    if not facts.data:
        yield "Where its text came from is not recorded where it was exported from."
    for folder, manifest in facts.data.items():
        sources = manifest.settings.get("sources")
        sources = list(sources) if isinstance(sources, list | tuple) else []
        told = ", ".join(map(_file, sources[:_MOST_SOURCES]))
        more = f" and {len(sources) - _MOST_SOURCES} more" if len(sources) > _MOST_SOURCES else ""
        what = "Pretrained on" if folder == "data" else "Fine-tuned on the answers in"
        yield (
            f"{what} {told or 'sources without a name'}{more}: "
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, of which "
            f"{manifest.val.documents:,} documents are held out; {manifest.duplicates:,} duplicates and "
            f"{manifest.rejected:,} that could not be used were left out."
        )
    rl = facts.config.posttrain.rl if facts.config else None
    if rl is not None:
        yield f"Rewarded on problems of {', '.join(_file(one.family or one.file or '') for one in rl.problems)}."


def _cost(facts: Facts) -> str:
    total = facts.total
    known = []
    if "wall_hours" in total:
        known.append(hours(total["wall_hours"]))
    if "energy_kwh" in total:
        sources = sorted({clean(entry.get("energy_source")) for entry in facts.spent.values()})
        known.append(f"{total['energy_kwh']:.3g} kWh ({_text(', '.join(sources))})")
    if any(number(entry.get("cost_usd")) is not None for entry in facts.spent.values()):
        known.append(f"{total['cost_usd']:,.2f} US dollars")
    return f"All stages together: {', '.join(known)}." if known else "Not recorded where it was exported from."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _file(source: object) -> str:
    """A source by its name alone."""
    return _text(PurePath(str(source)).name or "an unnamed source")


def _text(text: str) -> str:
    """Foreign words on one line, in which nothing is Markdown."""
    return _MEANS_SOMETHING.sub(r"\\\1", " ".join(clean(text).split()))


def _block(text: str) -> str:
    """Foreign text as it stands, in a fence that it cannot close."""
    shown = clean(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"
