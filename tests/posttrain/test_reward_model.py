"""Reward models: the loss beside its formula, learning which answers are preferred, and rewards from one."""

import json
import math
import random

import pytest
import torch

from benthic import api
from benthic.config.load import load_run_config
from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig
from benthic.data.prepare import prepare
from benthic.errors import InputError
from benthic.model.initial import initialise
from benthic.posttrain.reward_model import RewardArchitecture, Scorer, is_reward_model, padded, preference_loss
from benthic.train.metrics import read_metrics


def test_loss_is_that_of_bradley_and_terry():
    chosen, rejected = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 1.0, -70.0])
    expected = sum(math.log1p(math.exp(b - a)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 3
    assert preference_loss(chosen, rejected).item() == pytest.approx(expected)
    assert preference_loss(torch.zeros(2), torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert preference_loss(torch.tensor([-1e5]), torch.zeros(1)).item() == pytest.approx(1e5)


def test_padding_changes_no_score():
    model = RewardArchitecture().build(PRESETS["tiny"])
    initialise(model, PRESETS["tiny"].initializer_range, seed=0)
    short, long = [3, 1, 4, 1, 5], list(range(40))
    with torch.no_grad():
        alone = model(*padded([short], 9))
        together = model(*padded([long, short], 7))
    torch.testing.assert_close(together[1], alone[0])
    assert together[0] != together[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_run_config):
    out = tmp_path_factory.mktemp("base")
    config = tiny_run_config(steps=4, validate_every=4, checkpoint_every=4)
    prepare(config.data, config.model.vocab_size, out)
    api.train(config, out)
    return out


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory):
    """One that has learnt that answers with more of the letter e are preferred."""
    folder, draw = tmp_path_factory.mktemp("reward"), random.Random(0)
    rows = []
    for number in range(240):
        few, many = ("".join(draw.choices("aeo", weights)[0] for _ in range(6)) for weights in ([4, 1, 4], [1, 6, 1]))
        if few.count("e") < many.count("e"):
            rows.append({"prompt": f"word {number}", "chosen": many, "rejected": few})
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"pairs": [str(pairs)], "steps": 60, "batch_size": 8, "learning_rate": 3e-3, "held_out": 60}
    config = _with(base, reward={**given, "validate_every": 30, "checkpoint_every": 30})
    trained = api.train_reward_model(config, folder / "run")
    return folder / "run", trained


def _with(base, **posttrain):
    trained = load_run_config(base / "config.toml").model_dump(mode="json")
    return RunConfig.model_validate({**trained, "posttrain": {"base": str(base), **posttrain}})


def test_it_learns_what_is_preferred(reward_model):
    run, trained = reward_model
    validations = [row for row in read_metrics(run / "metrics.jsonl", "reward") if "preference_bits" in row]
    assert validations[0]["preference_bits"] == pytest.approx(1)  # a head of zeros knows nothing
    assert trained.bits_per_byte == validations[-1]["preference_bits"] < 0.6
    assert validations[-1]["preferred"]["value"] > 0.85
    assert is_reward_model(str(run))
    message = [{"role": "user", "content": "word 999"}]
    low, high = Scorer(run).scores([(message, "aoaoao"), (message, "eeeeae")])
    assert high > low + 1


def test_answers_are_rewarded_by_it(reward_model, base, tmp_path):
    problems = tmp_path / "words.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"word {number}", "answer": "e"}) + "\n" for number in range(30)))
    config = _with(
        base,
        rl={
            "problems": [{"file": str(problems), "rewards": [{"name": str(reward_model[0]), "weight": 0.5}]}],
            "steps": 2, "prompts": 4, "group_size": 4, "max_new_tokens": 6, "held_out": 5, "checkpoint_every": 2,
        },
    )  # fmt: skip
    api.train(config, tmp_path / "run")
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl", "rl") if "reward" in row]
    assert len(rewards) == 2
    assert all(math.isfinite(reward) for reward in rewards)


def test_what_is_no_reward_model_is_refused(base):
    assert not is_reward_model(str(base))
    with pytest.raises(InputError, match="holds no reward model"):
        Scorer(base)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a", "chosen": "b"}', "chosen"),
        ('{"chosen": "a", "rejected": "b"}', "prompt"),
        ("[1]", "chosen"),
        ("{", "not valid|JSON|Expecting"),
    ],
)
def test_a_pair_that_is_none_is_refused_with_its_place(base, tmp_path, line, told):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    config = _with(base, reward={"pairs": [str(pairs)], "steps": 1, "held_out": 1})
    with pytest.raises(InputError, match=f"pairs.jsonl: byte 48: .*({told})"):
        api.train_reward_model(config, tmp_path / "run")
