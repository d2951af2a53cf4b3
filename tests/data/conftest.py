"""A small corpus with everything in it that preparation has to deal with."""

import json
import random

import pytest

from benthic.config.schema import DataConfig
from benthic.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """90 unique documents, plain and spoken, every third one twice, and 2 lines to reject."""
    rng = random.Random(0)
    words = ["reef", "kelp", "vent", "abyss", "krill", "Größe", "深海", "🐙"]
    records = []
    for number in range(90):
        text = f"{number} " + " ".join(rng.choices(words, k=rng.randrange(1, 60)))
        spoken = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        records += [{"text": text} if number % 2 else {"messages": spoken}] * (2 if number % 3 == 0 else 1)
    rng.shuffle(records)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join([*map(json.dumps, records), "{", '{"text": ""}']))
    return path


@pytest.fixture(scope="session")
def data_config(corpus_file):
    return DataConfig(sources=(str(corpus_file),), validation_fraction=0.2, seed=3)


@pytest.fixture
def prepared(data_config, tmp_path):
    """A run directory with ``tokenizer/`` and ``data/``."""
    prepare(data_config, 400, tmp_path / "run")
    return tmp_path / "run"
