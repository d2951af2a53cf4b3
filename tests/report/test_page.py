"""The page of a run: strict, self-contained, safe with hostile text, and honest about what is missing."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from whole_run import HOSTILE, manifest

from benthic import api
from benthic.config.load import load_run_config
from benthic.convert.huggingface import save_hf
from benthic.errors import InputError
from benthic.model import build_model
from benthic.report.chart import Line, Point, Segment, line_chart
from benthic.report.page import write_report

XHTML = "{http://www.w3.org/1999/xhtml}"
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "article", "h1", "h2", "h3",
    "p", "ul", "li", "a", "dl", "div", "dt", "dd", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
    "span", "code", "pre", "details", "summary", "figure", "figcaption", "svg", "path", "br",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "id", "href", "class", "style", "scope", "data-label", "role",
    "aria-label", "aria-hidden", "viewBox", "preserveAspectRatio", "d",
}  # fmt: skip


def page_of(run: Path) -> ET.Element:
    """Parsed as XML, which forgives nothing; with no element or attribute that could fetch or run anything."""
    path, _ = write_report(run)
    page = ET.fromstring(path.read_text(encoding="utf-8"))
    for element in page.iter():
        assert element.tag.removeprefix(XHTML) in ELEMENTS
        assert set(element.attrib) <= ATTRIBUTES
        assert element.get("href", "#").startswith("#")
        assert re.fullmatch(r"((left|top|width|height):-?[\d.]+(%|rem);?)*", element.get("style", ""))
    style = page.find(f".//{XHTML}style").text
    assert "url(" not in style
    assert "@import" not in style
    return page


def text_of(page: ET.Element, section: str | None = None) -> str:
    root = page if section is None else next(one for one in page.iter(f"{XHTML}section") if one.get("id") == section)
    return " ".join(" ".join(root.itertext()).split())


def test_everything_is_on_the_page_and_foreign_text_is_only_text(full):
    page = page_of(full)
    text = text_of(page)
    assert "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>" in text
    assert "{{ 7*7 }}{% raw %}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ufffe]", text)
    assert "a <b> run" in text
    assert "pretrain text done 500 of 500" in text_of(page, "stages")
    assert "0.4 to 0.4 of held-out problems right" in text_of(page, "stages")
    assert "1.97 to 2.03, n 90" in text_of(page, "evaluation")
    assert "-0.3, intervals apart" in text_of(page, "evaluation")
    assert "+0.03, intervals overlap" in text_of(page, "mtp")
    assert "rl says ``````" in text_of(page, "samples")
    assert "Bits per byte at validations" in text_of(page, "course")
    assert "5 records, steps 100 to 500" in text_of(page, "experts")
    assert "chain_sum" in text_of(page, "rl")
    assert "with YaRN" in text_of(page, "context")
    assert "181: 90 to learn from, 91 held out" in text_of(page, "data")
    assert text_of(page, "data").count("cd" * 32) == 2
    assert "$0.80" in text_of(page, "ledger")
    assert "chain_sum" in text_of(page, "settings")
    assert "not measured" in text_of(page, "evaluation")  # "only", after pretraining
    policy = next(one for one in page.iter(f"{XHTML}meta") if one.get("http-equiv"))
    assert "default-src 'none'" in policy.get("content")


def test_curves_stand_where_their_values_are(full):
    """The learning rate falls to half its first value in every stage: a straight look at the coordinates."""
    page = page_of(full)
    chart = next(one for one in page.iter(f"{XHTML}svg") if one.get("aria-label") == "Learning rate")
    lines = [one.get("d") for one in chart if one.get("class", "").startswith("line")]
    assert len(lines) == 4
    walls = [float(one.get("d")[1:].split()[0]) for one in chart if one.get("class") == "wall"]
    assert walls == sorted(walls)
    for start, line in zip([0, *walls], lines, strict=True):
        points = [tuple(map(float, pair.split())) for pair in line[1:].split("L")]
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert points[0][0] == pytest.approx(start, abs=15)
        # A factor of two is log10(2) of the one decade that the axis spans.
        assert points[-1][1] - points[0][1] == pytest.approx(301, abs=12)


def test_labels_of_a_narrow_range_can_be_told_apart():
    points = [Point(x, 5.724 + x / 1e6, 0.0, 9.0) for x in range(5)]
    chart = line_chart("t", [Segment("s", 0, 4)], [Line("l", {"s": points})], unit="u")
    labels = re.findall(r'<span class="y"[^>]*>([^<]+)<', chart)
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)
    assert all(5.7239 < float(label) < 5.7241 for label in labels)


def test_where_a_teachers_answers_came_from(full, tmp_path):
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "asked.jsonl").touch()
    told = {"teacher": HOSTILE, "asked": 90, "kept": 77, "left_out": {HOSTILE: 13}, "answers_sha256": "x",
            "settings": {"temperature": 0.7, "system": HOSTILE}}  # fmt: skip
    (answers / "manifest.json").write_text(json.dumps(told))
    one = manifest("sft")
    settings = {**one.settings, "sources": [str(answers / "answers.jsonl"), "chitchat"]}
    one.model_copy(update={"settings": settings}).save(full / "sft")
    text = text_of(page_of(full), "data")
    assert "A teacher's answers" in text
    assert "answers 90 kept 77 left out 13 <script>" in text
    (answers / "manifest.json").write_text("[")
    assert "A teacher's answers" not in text_of(page_of(full), "data")


@pytest.mark.parametrize(
    ("missing", "section", "told"),
    [
        ("metrics.jsonl", "course", "No course is recorded"),
        ("ledger.json", "ledger", "there is no ledger.json"),
        ("data/manifest.json", "data", "fine-tuned on"),
        ("evaluation", "evaluation", "Not measured"),
        ("evaluation", "samples", "No samples were kept"),
        ("evaluation", "context", "Not measured"),
        ("config.toml", "settings", "There is no config.toml"),
        ("config.toml", "stages", "sizes are not known"),
    ],
)
def test_what_is_missing_is_told(full, missing, section, told):
    path = full / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert told in text_of(page_of(full), section)


@pytest.mark.parametrize(
    "file", ["metrics.jsonl", "ledger.json", "data/manifest.json", "sft/manifest.json", "evaluation/sft.json",
             "config.toml"]
)  # fmt: skip
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[1]\n", b'{"step": {}}\n', b'{"stages": {"x": {"tokens": "y"}}}']
)
def test_damaged_files_are_told_and_do_not_hinder(full, file, content):
    (full / file).write_bytes(content)
    path, facts = write_report(full)
    ET.fromstring(path.read_text(encoding="utf-8"))
    if file.endswith("manifest.json") or file.startswith("evaluation"):
        assert len(facts.damaged) == 1
        assert Path(file).name in facts.damaged[0]
        assert "could not be read" in text_of(page_of(full))


def test_odd_rows_do_not_hinder(full):
    rows = [{"step": 1, "stage": ["x"], "loss": 1},
            {"step": 2, "stage": "odd", "loss": "x", "mtp_losses": {"a": [[[[1]]]]}},
            {"step": 3, "stage": "odd", "expert_load": [[1, -1]], "loss": True, "accuracy": {"all": {"value": None}}},
            {"step": 4, "stage": "odd", "expert_load": [[]], "expert_load_max_over_mean": {"x": 1}}]  # fmt: skip
    with (full / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write('{"step": 5, "loss": NaN}\n{"step": 6, "lo')
    assert "odd" in text_of(page_of(full), "stages")


def test_experts_of_modules_that_run_in_some_steps_are_on_the_map(full):
    records = [[[1, 3], [4, 0], [6, 2]], [[5, 7], [0, 4]], [[1, 1, 1], [2, 2]]]
    with (full / "metrics.jsonl").open("a") as file:
        for step, load_ME in enumerate(records, start=1):
            file.write(json.dumps({"step": step, "stage": "last", "expert_load": load_ME}) + "\n")
    text = text_of(page_of(full), "experts")
    assert "3 records, steps 1 to 3" in text
    assert "layer 1 layer 2 MTP 1" in text


def test_a_run_that_goes_on(full):
    rows = (full / "metrics.jsonl").read_text().splitlines(keepends=True)
    (full / "metrics.jsonl").write_text("".join(rows[:200]))
    shutil.rmtree(full / "evaluation")
    text = text_of(page_of(full), "stages")
    assert re.search(r"pretrain text not finished \d+ of 500", text)
    assert "rl rewards not begun 0 of 60" in text
    assert "planned and has not begun" in text_of(page_of(full), "rl")


def test_a_model_that_was_imported(full, tmp_path):
    config = load_run_config(full / "config.toml").model
    run = tmp_path / "imported"
    run.mkdir()
    save_hf(build_model(config), config, None, run / "model", purpose="import")
    path, facts = api.write_report(run)
    assert facts.model is not None
    page = ET.fromstring(path.read_text())
    assert "216,144" in text_of(page, "stages")
    assert "No stage is known" in text_of(page, "stages")
    assert "not known here" in text_of(page, "data")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds none of config\.toml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
