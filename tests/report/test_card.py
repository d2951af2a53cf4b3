"""The model card: what it tells, that foreign text stays text in it, and that nobody's words are overwritten."""

import re

import pytest
from markdown_it import MarkdownIt

from benthic.convert.huggingface import save_hf
from benthic.convert.runs import export_hf
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.model import build_model
from benthic.report.card import is_untouched, model_card
from benthic.report.facts import read_facts


def test_the_card_of_a_whole_run(full):
    card = model_card(read_facts(full))
    assert card == model_card(read_facts(full))
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| validation (bits\\_per\\_byte) | 2 (1.97 to 2.03, 90) | 1.9 (1.87 to 1.93, 90) |" in card
    assert "181 documents" in card
    assert "0.80 US dollars" in card
    assert "/home/somebody" not in card


def test_foreign_text_is_only_text(full):
    """Rendered with HTML allowed: no tag, link or image of theirs comes to be, and each stays where it belongs."""
    body = model_card(read_facts(full)).partition("---\n\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    tags = set(re.findall(r"<(\w+)", html))
    assert tags <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert html.count("<h2>") == 5
    assert html.count("<table>") == 3
    assert html.count("<pre>") == 1 + 2 * 2
    assert "&lt;script&gt;" in html
    assert "\x1b" not in body


def test_a_card_without_any_facts(tmp_path):
    card = model_card(read_facts(tmp_path))
    assert "Not measured." in card
    assert card.lower().count("not recorded") == 3


@pytest.fixture
def model(full):
    facts = read_facts(full)
    tokenizer = Tokenizer.train(["some text to learn from, some more text"], vocab_size=280)
    tokenizer.save(full / "tokenizer")
    config = facts.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    save_hf(build_model(config), config, full / "tokenizer", full / "model", purpose="training")
    return full


def test_an_export_has_its_card_and_replaces_only_what_is_its_own(model, tmp_path):
    out = tmp_path / "exported"
    export_hf(model, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert is_untouched(card)
    assert "## Evaluation" in card
    export_hf(model, out)
    for changed in (card + "My own words.\n", card.replace("## Use", "## Usage"), "mine\n", "\udcff"):
        (out / "README.md").write_text(changed, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(InputError, match="already there and not replaced"):
            export_hf(model, out)
    (out / "README.md").unlink()
    export_hf(model, out)
    assert (out / "README.md").read_text(encoding="utf-8") == card
