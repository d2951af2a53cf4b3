"""Recipes and ``--set``: what is accepted arrives unchanged, what is wrong is refused in one telling line."""

import random
import tomllib

import numpy as np
import pytest
from recipes import refusal

from benthic.config.load import dump_toml, load_preset_or_recipe, load_run_config, recipe_names
from benthic.config.presets import PRESETS
from benthic.config.schema import InferenceConfig
from benthic.errors import InputError
from benthic.inference.request import Sampling

MINIMAL = '[model]\npreset = "tiny"\n[train]\nsteps = 3\n'


def test_a_preset_gives_sizes_and_further_keys_go_over_it(recipe):
    config = load_run_config(recipe('[model]\npreset = "tiny"\nhidden_size = 96\n[train]\nsteps = 3\n'))
    assert config.model == PRESETS["tiny"].model_copy(update={"hidden_size": 96})
    assert config.train.steps == 3


def test_one_key_of_a_nested_table_leaves_its_neighbours(recipe):
    text = '[model]\npreset = "v3-671b"\n[model.rope_scaling]\nfactor = 8.0\n[train]\nsteps = 1\n'
    yarn = load_run_config(recipe(text)).model.rope_scaling
    assert (yarn.factor, yarn.original_max_position_embeddings) == (8.0, 4096)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_by_name(name):
    assert load_run_config(name).data.sources


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_stands_for_a_recipe(name):
    assert load_preset_or_recipe(name).model == PRESETS[name]


@pytest.mark.parametrize(("overrides", "length"), [
    ([], 256), (["model.preset=nano"], 512), (["model.max_position_embeddings=100"], 100),
    (["train.sequence_length=77"], 77), (["model.preset=v3-671b"], 4096),
])  # fmt: skip
def test_a_presets_sequences_are_as_long_as_the_model_was_pretrained_with(overrides, length):
    assert load_preset_or_recipe("tiny", overrides).train.sequence_length == length


def test_without_a_recipe_it_is_the_quickstart():
    assert load_run_config() == load_run_config("quickstart")


@pytest.mark.parametrize("name", PRESETS)
def test_dump_round_trips_and_names_every_setting(name, recipe):
    seed = random.Random(name)
    config = load_run_config(recipe(MINIMAL), [
        f"model.preset={name}", f"train.optimizer.learning_rate={seed.uniform(1e-5, 1e-2)!r}",
        f"train.seed={seed.randrange(2**31)}", 'data.sources=["stdlib", "a path/with = and \\" in it.txt"]',
    ])  # fmt: skip
    text = dump_toml(config)
    assert load_run_config(recipe(text)) == config
    assert set(tomllib.loads(text)) == set(type(config).model_fields)
    assert tomllib.loads(text)["train"]["optimizer"]["eps"] == config.train.optimizer.eps


@pytest.mark.parametrize(("text", "value"), [
    ("train.steps=200", 200), ("train.minutes=1.5", 1.5), ("train.minutes=2", 2.0), ("model.rms_norm_eps=1e-5", 1e-5),
    ("data.mask_documents=true", True),
    ('data.sources=["a", "b"]', ("a", "b")), ("train.optimizer.name=adamw", "adamw"),
    ("data.tokenizer=some/dir=x", "some/dir=x"), ("train.optimizer.betas=[0.5, 0]", (0.5, 0.0)),
])  # fmt: skip
def test_set_reads_a_value_as_toml_or_else_as_text(recipe, text, value):
    found = load_run_config(recipe(MINIMAL), [text])
    for name in text.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


def test_none_takes_back_what_a_preset_or_a_recipe_says(recipe):
    text = '[model]\npreset = "v3-671b"\nrope_scaling = "none"\n[train]\nsteps = 1\nmicro_batch_size = 2\n'
    config = load_run_config(recipe(text), ["model.q_lora_rank=none", "train.micro_batch_size=none"])
    assert config.model == PRESETS["v3-671b"].model_copy(update={"q_lora_rank": None, "rope_scaling": None})
    assert config.train.micro_batch_size is None
    assert load_run_config(recipe(dump_toml(config))) == config


def test_none_of_choices_arrays_and_lengths():
    config = load_run_config("quickstart", [
        "serve.precision=int8", "serve.precision=none", "parallel.layers=none", "train.steps=none",
        "posttrain.sft.epochs=none",
    ])  # fmt: skip
    assert config == load_run_config("quickstart")
    assert config.model.q_lora_rank is None


def test_none_is_looked_for_in_text_alone():
    stop = np.array([1, 2])
    assert Sampling.checked(InferenceConfig(), {"stop_token_ids": stop}).stop_token_ids == (1, 2)


def test_where_text_may_stand_none_is_text(recipe):
    assert load_run_config(recipe(MINIMAL), ["data.tokenizer=none"]).data.tokenizer == "none"


def test_later_set_wins(recipe):
    assert load_run_config(recipe(MINIMAL), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_length_set_in_one_unit_replaces_the_recipes(recipe):
    config = load_run_config(recipe(MINIMAL), ["train.minutes=1"])
    assert (config.train.minutes, config.train.steps) == (1, None)
    assert "give either steps or minutes" in refusal(recipe(MINIMAL), "train.minutes=1", "train.steps=5")


def test_a_preset_set_replaces_all_sizes_of_a_resolved_recipe(recipe):
    resolved = recipe(dump_toml(load_run_config(recipe(MINIMAL))))
    assert load_run_config(resolved, ["model.preset=nano"]).model == PRESETS["nano"]


@pytest.mark.parametrize(("text", "said"), [
    ("model.hidden_size=none", ['model.hidden_size = "none"', "integer"]),
    ("train.steps=0", ["train.steps = 0", "greater than 0"]),
    ("train.steps=true", ["train.steps = true", "integer"]),
    ("train.steps=many", ['train.steps = "many"', "integer"]),
    ("train.steps=1.5", ["train.steps = 1.5", "integer"]),
    ("train.stesp=4", ["train.stesp = 4", "did you mean 'steps'"]),
    ("zzz=1", ["zzz = 1", "allowed are model, data, train"]),
    ("model.presett=nano", ["model.presett", "did you mean 'preset'"]),
    ("model.preset=nanno", ['model.preset = "nanno"', "did you mean 'nano'"]),
    ("model.preset=[1]", ["model.preset = [1]", "allowed are tiny, nano"]),
    ("model.rope_scaling.factr=4", ["model.rope_scaling.factr", "did you mean 'factor'"]),
    ("model.n_group=3", ["model", "n_group=3 must divide n_routed_experts=8"]),
    ("model=3", ["model = 3", "table"]),
    ("train.steps.x=3", ["train.steps"]),
    ("data.sources=stdlib", ['data.sources = "stdlib"', "array"]),
    ("data.sources=[]", ["data.sources = []", "at least 1"]),
    ("train.optimizer.betas=[0.9, 1]", ["train.optimizer.betas", "less than 1"]),
    ("train.seed=100000000000000000000", ["train.seed", "9223372036854775808"]),
    ("train.optimizer.name=sgd", ['"sgd"', "'adamw' or 'muon'"]),
    ("train.optimizer.learning_rate=nan", ["learning_rate = NaN", "finite"]),
    ("train.schedule.warmup=0.9", ["warmup=0.9 must not be after decay_start"]),
    ("train.sequence_length=257", ["train.sequence_length=257", "at most model.max_position_embeddings=256"]),
    ("model.max_position_embeddings=255", ["train.sequence_length=256", "model.max_position_embeddings=255"]),
    ("train.steps", ["KEY=VALUE"]),
    ("=3", ["KEY=VALUE"]),
])  # fmt: skip
def test_a_wrong_set_is_refused_with_key_value_and_what_is_allowed(recipe, text, said):
    line = refusal(recipe(MINIMAL), text)
    assert line.startswith("--set ")
    assert all(part in line for part in said), line


@pytest.mark.parametrize(("text", "said"), [
    ("a = \n", "line 1"),
    ('[model]\npreset = "tiny"\n[train\n', "line 3"),
    (b"\xff\xfe", "UTF-8"),
    ("", "model: missing"),
    (MINIMAL + "batch_sise = 3\n", "train.batch_sise = 3: no such setting; did you mean 'batch_size'"),
    (MINIMAL + 'seed = "x"\n', 'train.seed = "x"'),
    (MINIMAL + "sequence_length = 300\n", "train.sequence_length=300 must be at most"),
])  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_path(recipe, text, said):
    path = recipe(text)
    line = refusal(path)
    assert line.startswith(f"{path}: ")
    assert said in line


def test_a_recipe_that_is_no_file_is_refused(tmp_path):
    assert "did you mean 'quickstart'" in refusal("quikstart")
    assert str(tmp_path) in refusal(tmp_path)


def test_a_wrong_preset_suggests_presets_and_recipes():
    with pytest.raises(InputError, match=r"did you mean 'v3-671b'"):
        load_preset_or_recipe("v3-671")


def test_several_mistakes_are_counted(recipe):
    assert refusal(recipe(MINIMAL + "seed = -1\nbatch_size = 0\n")).endswith("(and 1 more)")
