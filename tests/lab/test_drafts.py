"""benchmarks/drafts.py: its figures follow from what the engines say, and a text that drafts change is no result."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import benthic
from benthic.errors import InputError, WorkFailed
from benthic.inference.request import Completion

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def drafts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("drafts", BENCHMARKS / "drafts.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "drafts", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trained(tiny_run_config, make_run):
    """A run of a few steps."""

    def build(**model):
        out = make_run()
        benthic.train(tiny_run_config(steps=2, model=model), out)
        return out

    return build


def completion(ids, drafted=0, accepted=0, seconds=1.0):
    return Completion(
        "text", tuple(ids), (0.0,) * len(ids), "length", drafted_tokens=drafted, accepted_tokens=accepted,
        first_token_s=0.25, total_s=0.25 + seconds,
    )  # fmt: skip


def test_figures_follow_from_completions(drafts):
    plain = [[completion(range(5), seconds=s), completion(range(3), seconds=s)] for s in (1.0, 3.0, 2.0)]
    ours = [[completion(range(5), 3, 2, s), completion(range(3), 1, 0, s)] for s in (0.5, 3.0, 0.5)]
    told = drafts.line(2, ours, plain)
    assert told.tokens_per_s == pytest.approx(6 / 1.0)
    assert told.over_none == pytest.approx(2)
    assert (told.drafted_per_100, told.accepted_per_100) == pytest.approx((50, 25))
    assert told.acceptance == pytest.approx(0.5)
    assert drafts.line(0, plain, plain).acceptance is None


def test_another_text_is_no_result(drafts):
    same, other = completion([1, 2, 3]), completion([1, 2, 4])
    drafts.refuse_other_text(1, [same, other], [same, other])
    with pytest.raises(WorkFailed, match="prompt 1: with max_draft=2 another text"):
        drafts.refuse_other_text(2, [same, same], [same, other])


def test_a_run_is_measured(drafts, trained, capsys, monkeypatch):
    monkeypatch.setattr(drafts, "ROUNDS", 2)
    run = trained()
    drafts.main([str(run), "--most", "2", "--tokens", "12", "--prompts", "3", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [each["max_draft"] for each in told] == [0, 1, 2]
    assert all(each["tokens_per_s"] > 0 for each in told)
    assert (told[0]["over_none"], told[0]["drafted_per_100"], told[0]["acceptance"]) == (1.0, 0.0, None)
    assert all(each["drafted_per_100"] >= each["accepted_per_100"] >= 0 for each in told)
    drafts.main([str(run), "--most", "1", "--tokens", "12", "--prompts", "1", "--precision", "int8"])
    assert "medians of 2" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(drafts, trained, tmp_path):
    with pytest.raises(InputError, match="holds no data/"):
        drafts.main([str(tmp_path)])
    run = trained()
    with pytest.raises(InputError, match="--tokens 1: must be from 2"):
        drafts.main([str(run), "--tokens", "1"])
    with pytest.raises(InputError, match="--tokens 99999: must be from 2"):
        drafts.main([str(run), "--tokens", "99999"])


def test_a_model_without_mtp_is_refused(drafts, trained):
    run = trained(num_nextn_predict_layers=0)
    with pytest.raises(InputError, match="no MTP modules"):
        drafts.main([str(run), "--tokens", "4"])
