"""``report.html``: one file that asks nobody for anything, runs nothing, and can be read on a phone or in the dark."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from benthic.config.schema import ModelConfig
from benthic.data.manifest import SPLITS, Manifest
from benthic.data.prepare import SOURCES_HASH
from benthic.evaluate.score import Score
from benthic.files import cannot_write, write_atomically
from benthic.plan.counts import activated, main_model, mtp_modules
from benthic.plan.power import cpu_name
from benthic.posttrain.sft_data import SAMPLES
from benthic.report import experts
from benthic.report.chart import COLOURS, Line, Point, Segment, interval_mark, line_chart
from benthic.report.course import Curve
from benthic.report.facts import Facts, Progress, number, read_facts, refuse_no_run
from benthic.report.words import clean, figure, hours, large
from benthic.version import VERSION

FILE_NAME = "report.html"
MOST_PROMPTS = 30
MOST_SHOWN = 50
"""Sources, rejections and the like; how many more there are is told."""
_BYTES = {"validation_bits_per_byte": "held-out text", "answer_bits_per_byte": "held-out answers"}
"""Validations' figures, and what they are of."""
_LEARNS = {"corpus": "text", "base": "nothing", "sft": "answers", "rl": "rewards", "reward": "preferences"}


class Cell(NamedTuple):
    """A score in a table."""

    value: str
    interval: str
    n: str
    mark: Markup


class ScoreRow(NamedTuple):
    """A score by stage."""

    name: str
    metric: str
    cells: list[Cell | None]
    """One for each stage."""
    change: str
    """From the first to the last stage that has it."""


def write_report(run: Path, model: ModelConfig | None = None) -> tuple[Path, Facts]:
    """Write ``run/report.html``; returns its path, and what it is made of.

    Args:
        run: a run's directory, finished or not.
        model: the sizes of its model, where no ``config.toml`` says them.

    Raises:
        InputError: this is no run, or the file cannot be written.
        WorkFailed: the disk is full.
    """
    refuse_no_run(run)
    facts = read_facts(run, model)
    path = run / FILE_NAME
    try:
        write_atomically(path, render(facts))
    except OSError as error:
        raise cannot_write(path, error) from error
    return path, facts


def render(facts: Facts) -> str:
    """The page."""
    return _template().render(_context(facts))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("benthic.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"clean": clean, "figure": figure, "large": large, "hours": hours}
    return environment.get_template("report.html")


def _context(facts: Facts) -> dict[str, Any]:
    names = list(facts.records)
    return {
        "facts": facts,
        "name": facts.run.resolve().name,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "here": f"Benthic {VERSION}, Python {platform.python_version()}, {cpu_name() or 'an unnamed processor'}",
        "sizes": _sizes(facts.model) if facts.model else None,
        "learns": _LEARNS,
        "figures": {one.name: list(_figures(facts, one)) for one in facts.progress},
        "columns": names,
        "scores": _score_rows(names, {name: record.scores for name, record in facts.records.items()}),
        "acceptance": _score_rows(names, {
            name: {f"depth {depth}": score for depth, score in enumerate(record.acceptance, start=1)}
            for name, record in facts.records.items()
        }),
        "not_measured": [(name, *one) for name, record in facts.records.items() for one in record.not_measured.items()],
        "samples": _samples(facts),
        "course": _course_charts(facts) if facts.course else [],
        "top1": _top1_chart(facts) if facts.course else None,
        "experts": experts.map_of(facts),
        "rl": {
            one.name: list(_rl_charts(facts, one))
            for one in facts.progress
            if one.kind == "rl" and _has(facts, one)
        },
        "rl_planned": any(one.kind == "rl" for one in facts.progress),
        "positions": _positions(facts),
        "distilled": [_distilled(source, found) for source, found in facts.distilled.items()],
        "data": [_provenance(name, manifest) for name, manifest in facts.data.items()],
        "made_with": _made_with(facts),
        "problems": _problems(facts),
        "number": number,
        "events": [
            (name, course.event_count, [_event(row) for row in course.events])
            for name, course in facts.course.items()
            if course.events
        ],
    }  # fmt: skip


def _has(facts: Facts, one: Progress) -> bool:
    return one.name in facts.course


def _sizes(model: ModelConfig) -> dict[str, str]:
    main = main_model(model)
    sizes = {
        "parameters": large(main.total),
        "used by a token": large(activated(main, model).total),
        "MTP modules": f"{model.num_nextn_predict_layers}, {large(mtp_modules(model).total)} parameters",
        "layers": f"{model.num_hidden_layers}, of which {model.first_k_dense_replace} dense",
        "experts": f"{model.n_routed_experts}, {model.num_experts_per_tok} a token, {model.n_shared_experts} shared",
        "latent cache": f"{model.latent_dim} numbers a token and layer",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_position_embeddings:,} tokens",
    }
    if model.rope_scaling is not None:
        sizes["YaRN"] = f"{model.rope_scaling.factor:g} times {model.rope_scaling.original_max_position_embeddings:,}"
    return sizes


def _figures(facts: Facts, one: Progress) -> Iterable[str]:
    """What validations told of a stage, first and last."""
    if not _has(facts, one):
        return
    for key, of in _BYTES.items():
        curve = facts.course[one.name].curves.get(key)
        if curve is not None:
            yield f"{_first_and_last(curve)} bits per byte of {_of(one, of)}"
    accuracy = facts.course[one.name].curves.get("accuracy/all/value")
    if accuracy is not None:
        yield f"{_first_and_last(accuracy)} of held-out problems right"


def _of(one: Progress, of: str) -> str:
    # Where pretraining's text is not at hand, reinforcement learning reads other text.
    return "text held out" if one.kind == "rl" else of


def _first_and_last(curve: Curve) -> str:
    first = curve.buckets[0].mean
    several = curve.buckets[0].values > 1 or len(curve.buckets) > 1
    return f"{figure(first)} to {figure(curve.last)}" if several else figure(curve.last)


# ---------------------------------------------------------------------- scores


def _score_rows(stages: Sequence[str], scores: Mapping[str, Mapping[str, Score]]) -> list[ScoreRow]:
    """Every name that any stage has a score under."""
    names = dict.fromkeys(name for stage in stages for name in scores[stage])
    return [_score_row(name, [scores[stage].get(name) for stage in stages]) for name in names]


def _score_row(name: str, found: Sequence[Score | None]) -> ScoreRow:
    there = [score for score in found if score is not None]
    ends = [edge for score in there for edge in _ends(score)]
    cells = [None if score is None else _cell(score, min(ends), max(ends)) for score in found]
    return ScoreRow(clean(name), clean(there[0].metric), cells, _change(there[0], there[-1]) if len(there) > 1 else "")


def _ends(score: Score) -> tuple[float, float]:
    return score.ci95 or (score.value, score.value)


def _cell(score: Score, least: float, most: float) -> Cell:
    low, high = _ends(score)
    interval = f"{figure(low)} to {figure(high)}" if score.ci95 else "no interval"
    return Cell(figure(score.value), interval, f"{score.n:,}", interval_mark(low, score.value, high, least, most))


def _change(first: Score, last: Score) -> str:
    difference = last.value - first.value
    sign = "+" if difference > 0 else ""
    if not (first.ci95 and last.ci95):
        return f"{sign}{figure(difference)}"
    apart = first.ci95[1] < last.ci95[0] or last.ci95[1] < first.ci95[0]
    return f"{sign}{figure(difference)}, intervals {'apart' if apart else 'overlap'}"


class Said(NamedTuple):
    """A prompt, and what each stage's model answered."""

    prompt: str
    wanted: str | None
    answers: list[tuple[str, str, float | None]]
    """Stage, answer and score."""


def _samples(facts: Facts) -> list[Said]:
    by_prompt: dict[str, Said] = {}
    for stage, record in facts.records.items():
        for sample in record.samples:
            if sample.prompt not in by_prompt and len(by_prompt) == MOST_PROMPTS:
                continue
            wanted = None if sample.wanted is None else clean(sample.wanted)
            said = by_prompt.setdefault(sample.prompt, Said(clean(sample.prompt), wanted, []))
            said.answers.append((stage, clean(sample.answer), sample.score))
    return list(by_prompt.values())


# ---------------------------------------------------------------------- charts


def _segments(facts: Facts, kinds: Iterable[str]) -> list[Segment]:
    """Stages that something is recorded of; one that was planned to go on has room to do so."""
    return [
        Segment(one.name, 0, max(one.done, one.planned or 0, 1))
        for one in facts.progress
        if one.kind in kinds and _has(facts, one)
    ]


def _line(facts: Facts, segments: Sequence[Segment], name: str, key: str) -> Line:
    curves = {one.name: facts.course[one.name].curves.get(key) for one in segments}
    return Line(name, {stage: points_of(curve) for stage, curve in curves.items() if curve is not None})


def points_of(curve: Curve) -> list[Point]:
    """A curve's buckets, each in its middle."""
    return [Point((one.first + one.last) / 2, one.mean, one.least, one.most) for one in curve.buckets]


def _course_charts(facts: Facts) -> list[Markup]:
    learning, every = _segments(facts, ("corpus", "sft")), _segments(facts, _LEARNS)
    charts = []
    every_bytes = [_line(facts, every, of, key) for key, of in _BYTES.items()]
    charts.append(line_chart("Bits per byte at validations", every, every_bytes, unit="bits per byte"))
    if learning:
        depths = _depths(facts, learning, "mtp_losses")
        lines = [_line(facts, learning, "next token", "loss")]
        lines += [_line(facts, learning, f"MTP depth {depth + 1}", f"mtp_losses/{depth}") for depth in range(depths)]
        charts.append(line_chart("Loss", learning, lines, unit="nats a token; shaded from least to most"))
    rate = [_line(facts, every, "learning rate", "learning_rate")]
    charts.append(
        line_chart(
            "Learning rate",
            every,
            rate,
            unit="of AdamW; a matrix of Muon's has its own in proportion",
            logarithmic=True,
        )
    )
    return charts


def _depths(facts: Facts, segments: Sequence[Segment], key: str) -> int:
    """Depths of multi-token prediction, as far as lines can be told apart."""
    return min(COLOURS - 1, max((len(facts.course[one.name].family(key)) for one in segments), default=0))


def _top1_chart(facts: Facts) -> Markup:
    segments = _segments(facts, _LEARNS)
    depths = _depths(facts, segments, "top1_accuracy")
    names = ["next token", *(f"MTP depth {depth}" for depth in range(1, depths))]
    lines = [_line(facts, segments, name, f"top1_accuracy/{place}") for place, name in enumerate(names)]
    return line_chart("The likeliest token is the right one", segments, lines, unit="share of held-out tokens")


def _rl_charts(facts: Facts, one: Progress) -> Iterable[Markup]:
    segment = [Segment(one.name, 0, max(one.done, one.planned or 0, 1))]
    chart = partial(_of_one_stage, facts, segment)
    by_source = {name: f"reward_by_source/{name}" for name in facts.course[one.name].family("reward_by_source")}
    yield chart("Reward", "mean of the answers sampled", {"all": "reward", **by_source})
    yield _accuracy_chart(facts, segment)
    yield chart("Length of answers", "tokens, mean", {"answer length": "answer_length"})
    yield chart("Entropy of the sampler", "nats a token", {"entropy": "entropy"})
    yield chart("Divergence from the reference", "nats a token; 0 where none is kept", {"KL": "kl"})
    groups = {"groups without variance": "groups_without_variance", "answers not ended": "unfinished"}
    yield chart("What teaches nothing", "a batch", groups)


def _of_one_stage(facts: Facts, segments: Sequence[Segment], title: str, unit: str, lines: Mapping[str, str]) -> Markup:
    return line_chart(title, segments, [_line(facts, segments, *one) for one in lines.items()], unit=unit)


def _accuracy_chart(facts: Facts, segments: Sequence[Segment]) -> Markup:
    course = facts.course[segments[0].name]
    lines = []
    for key, name in (("accuracy", "likeliest answers"), ("sampled_accuracy", "sampled answers")):
        parts = [course.curves.get(f"{key}/all/{part}") for part in ("value", "ci95/0", "ci95/1")]
        if (value := parts[0]) is None:
            continue
        points = points_of(value)
        edges = [points_of(part) for part in parts[1:] if part is not None]
        if len(edges) == 2 and all(len(edge) == len(points) for edge in edges):
            points = [
                Point(point.x, point.y, low.y, high.y) for point, low, high in zip(points, *edges, strict=True)
            ]  # fmt: skip
        lines.append(Line(name, {segments[0].name: points}))
    unit = "share of held-out problems; shaded: 95% interval"
    return line_chart("Accuracy at validations", segments, lines, unit=unit, whole_bands=True)


def _positions(facts: Facts) -> Markup | None:
    """One chart of all stages whose evaluation has bits per byte by position."""
    measured = {name: record for name, record in facts.records.items() if record.by_position}
    if not measured:
        return None
    curves = {f"after {name}, {curve.name}": curve for name, record in measured.items() for curve in record.by_position}
    whole = Segment("sequence", 0, max(curve.ends[-1] for curve in curves.values()))
    lines = []
    for name, curve in curves.items():
        middles = [(start + end) / 2 for start, end in zip((0, *curve.ends), curve.ends, strict=False)]
        points = [Point(x, y, y, y) for x, y in zip(middles, curve.bits_per_byte, strict=True)]
        lines.append(Line(name, {whole.name: points}))
    mark = next((record.pretrained_length for record in measured.values() if record.pretrained_length), None)
    return line_chart(
        "Bits per byte along held-out sequences", [whole], lines, unit="bits per byte", below="position",
        mark=mark if mark and mark < whole.last else None,
    )  # fmt: skip


# ---------------------------------------------------------------------- provenance


def _provenance(folder: str, manifest: Manifest) -> dict[str, Any]:
    sources = manifest.settings.get("sources")
    samples = manifest.settings.get(SAMPLES)
    counts = samples if isinstance(samples, dict) else {}
    return {
        "folder": folder,
        "manifest": manifest,
        "sources": [clean(one) for one in sources][:MOST_SHOWN] if isinstance(sources, list | tuple) else [],
        "more": max(0, len(sources) - MOST_SHOWN) if isinstance(sources, list | tuple) else 0,
        "sources_sha256": clean(manifest.settings.get(SOURCES_HASH, "not recorded")),
        "samples": [
            (split, ", ".join(clean(count) for count in counts[split])) for split in SPLITS if _is_list(counts, split)
        ],
        "rejections": manifest.rejections[:MOST_SHOWN],
        "files": [file for split in (manifest.train, manifest.val) for file in (*split.shards, split.boundaries)],
    }


def _is_list(found: Mapping[str, Any], key: str) -> bool:
    return isinstance(found.get(key), list | tuple)


def _made_with(facts: Facts) -> list[tuple[str, dict[str, Any]]]:
    """What the stages were computed with, those alike together."""
    alike: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for stage, several in facts.made_with.items():
        for one in several:
            alike.setdefault(repr(sorted(one.items())), ([], one))[0].append(stage)
    return [(", ".join(stages), one) for stages, one in alike.values()]


def _distilled(source: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's answers say of themselves."""
    left_out = found.get("left_out")
    settings = found.get("settings")
    told = {"teacher": found.get("teacher"), "answers": found.get("asked"), "kept": found.get("kept")}
    if isinstance(left_out, dict):
        told["left out"] = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    if isinstance(settings, dict):
        told |= {key: settings.get(key) for key in ("temperature", "top_p", "system") if settings.get(key) is not None}
    return {"source": source, "told": list(told.items())}


def _problems(facts: Facts) -> list[dict[str, Any]]:
    rl = facts.config.posttrain.rl if facts.config else None
    return [
        {
            "name": one.family or one.file or "",
            "settings": ", ".join(f"{key} = {value}" for key, value in one.settings.items()),
            "weight": one.weight,
            "rewards": ", ".join(f"{reward.name} ({reward.weight:g})" for reward in one.rewards)
            or ("reasoning_gym" if one.family else "exact"),
        }
        for one in (rl.problems if rl else ())
    ]


def _event(row: Mapping[str, Any]) -> str:
    what = ", ".join(f"{key} {row[key]}" for key in ("event", "reason", "kind", "sequences") if key in row)
    return clean(f"step {row.get('step')}: {what}", 300)
