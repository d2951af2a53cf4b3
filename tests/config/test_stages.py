"""A run's stages: their order, what each takes from the recipe, and the published two phases of context extension."""

import random

import pytest
from recipes import refusal

from benthic.config.load import dump_toml, load_run_config
from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig, ScheduleConfig, TrainConfig
from benthic.config.stages import held, stages
from benthic.train.schedule import Course

MINIMAL = '[model]\npreset = "tiny"\n[train]\nsteps = 3\nsequence_length = 32\n'
PHASES = "[[train.extend]]\nsequence_length = 64\nsteps = 5\n[[train.extend]]\nsequence_length = 96\nsteps = 7\n"


def settings(schedule: ScheduleConfig, steps: int, step: int):
    found = Course(schedule, steps, 4).at(step)
    return found.learning_rate_factor, found.bias_speed, found.mtp_weight, found.balance_weight


@pytest.mark.parametrize("name", ["bench", "tiny"])
def test_a_run_without_phases_is_one_stage_with_the_runs_own_settings(name):
    config = load_run_config(name)
    (stage,) = stages(config)
    assert (stage.name, stage.config) == ("pretrain", config)


def test_the_quickstart_has_every_stage():
    assert [stage.name for stage in stages(load_run_config("quickstart"))] == ["pretrain", "extend-1", "sft", "rl"]


def test_the_published_phases(recipe):
    config = load_run_config("v3-671b")
    pretrain, *phases = stages(config)
    assert [stage.name for stage in (pretrain, *phases)] == ["pretrain", "extend-1", "extend-2"]
    assert (pretrain.config.model.rope_scaling, pretrain.config.model.max_position_embeddings) == (None, 4096)
    assert pretrain.config.train == config.train.model_copy(update={"extend": ()})
    published = ((32768, 1920), (131072, 480))
    for stage, (length, batch) in zip(phases, published, strict=True):
        model, train = stage.config.model, stage.config.train
        assert model == PRESETS["v3-671b"]
        yarn = model.rope_scaling
        assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale_all_dim) == (40, 32, 1, 1)
        assert yarn.original_max_position_embeddings == 4096
        assert (train.sequence_length, train.batch_size, train.steps) == (length, batch, 1000)
        assert (train.optimizer.learning_rate, train.micro_batch_size) == (7.3e-6, 1)
        assert train.batch_size * train.sequence_length == pretrain.config.train.batch_size * 4096
        course = Course(train.schedule, train.steps, train.batch_size)
        assert course.sequences == 1000 * batch
        # The rate is constant; the routers' bias rests and MTP weighs what it did when pretraining ended.
        assert {settings(train.schedule, 1000, step) for step in (0, 1, 500, 999)} == {(1.0, 0.0, 0.1, 1e-4)}


def test_batch_and_rate_left_out_are_the_published_ones():
    given = load_run_config("v3-671b")
    phases = [phase.model_copy(update={"batch_size": None, "learning_rate": None}) for phase in given.train.extend]
    found = stages(given.model_copy(update={"train": given.train.model_copy(update={"extend": tuple(phases)})}))
    for stage, published in zip(found[1:], stages(given)[1:], strict=True):
        assert stage.config.train.batch_size == published.config.train.batch_size
        assert stage.config.train.optimizer.learning_rate == pytest.approx(7.3e-6, rel=1e-12)


def test_yarn_reaches_from_the_pretraining_length_to_the_longest_phase_by_default(recipe):
    pretrain, first, second = stages(load_run_config(recipe(MINIMAL + PHASES)))
    assert pretrain.config.model == PRESETS["tiny"]
    assert first.config.model == second.config.model
    yarn = first.config.model.rope_scaling
    assert (yarn.factor, yarn.original_max_position_embeddings) == (3.0, 32)
    assert first.config.model.max_position_embeddings == 96
    assert [stage.config.train.steps for stage in (pretrain, first, second)] == [3, 5, 7]


def test_a_length_that_no_factor_reaches_exactly_is_reached(recipe):
    for original in range(30, 60):
        text = MINIMAL.replace("= 32", f"= {original}") + "[[train.extend]]\nsequence_length = 97\nsteps = 5\n"
        assert stages(load_run_config(recipe(text)))[1].config.model.max_position_embeddings == 97


def test_every_stage_is_itself_a_valid_run(recipe):
    for config in (load_run_config(recipe(MINIMAL + PHASES)), load_run_config("v3-671b"), load_run_config("extend")):
        for stage in stages(config):
            assert RunConfig.model_validate(stage.config.model_dump()) == stage.config
            assert stages(stage.config)[0].config == stage.config


def test_muons_and_the_embeddings_rates_keep_their_proportion(recipe):
    text = MINIMAL + "[train.optimizer]\nname = 'muon'\nlearning_rate = 8e-3\nmatrix_learning_rate = 5e-3\n"
    config = load_run_config(recipe(text + PHASES + "learning_rate = 2e-3\n"))
    default, given = (stage.config.train.optimizer for stage in stages(config)[1:])
    tail = config.train.schedule.tail_factor
    assert (default.learning_rate, default.matrix_learning_rate) == pytest.approx((8e-3 * tail, 5e-3 * tail))
    assert (given.learning_rate, given.matrix_learning_rate) == pytest.approx((2e-3, 5e-3 / 4))
    assert default.embedding_learning_rate is given.embedding_learning_rate is None
    config = load_run_config(recipe(text + "embedding_learning_rate = 4e-2\n" + PHASES + "learning_rate = 2e-3\n"))
    default, given = (stage.config.train.optimizer.embedding_learning_rate for stage in stages(config)[1:])
    assert (default, given) == pytest.approx((4e-2 * tail, 1e-2))


@pytest.mark.parametrize("decay", [(0.3, 0.8), (0.3, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("tail_start", [0.9, 1.0])
def test_a_phase_goes_on_at_the_rate_that_pretraining_ends_with(recipe, decay, tail_start):
    moments = {"decay_start": decay[0], "decay_end": decay[1], "tail_start": max(tail_start, decay[1])}
    moments |= {"decay_factor": 0.25, "tail_factor": 0.5}
    settings = [f"train.schedule.{key}={value}" for key, value in moments.items()]
    config = load_run_config(recipe(MINIMAL + PHASES), [*settings, "train.optimizer.learning_rate=0.01"])
    last = Course(config.train.schedule, 100_000, 1).at(99_999).learning_rate_factor
    assert stages(config)[1].config.train.optimizer.learning_rate == pytest.approx(0.01 * last, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_held_schedule_is_what_the_last_step_had(seed):
    rng = random.Random(seed)
    schedule = ScheduleConfig(
        bias_update_speed=rng.choice([0.0, 0.01]), bias_update_until=rng.choice([0.5, 0.9, 1.0]),
        mtp_late_start=rng.choice([0.0, 0.7, 1.0]), mtp_loss_weight=rng.random(), mtp_late_loss_weight=rng.random(),
        balance_loss_weight=rng.random(), batch_ramp=rng.choice([0.0, 0.5]),
    )  # fmt: skip
    last = settings(schedule, 1000, 999)[1:]
    for step in (0, 3, 6):
        assert settings(held(schedule), 7, step) == (1.0, *last)
    assert Course(held(schedule), 7, 4).sequences == 28


def test_what_is_held_has_mtp_in_every_step():
    assert held(ScheduleConfig(mtp_every=5)).mtp_every == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_phase_reads_no_more_tokens_at_once_than_pretraining(seed):
    rng = random.Random(seed)
    micro = rng.randrange(1, 9)
    length = rng.randrange(8, 40)
    phases = [{"sequence_length": length * factor, "steps": 1} for factor in sorted(rng.sample(range(2, 30), 2))]
    phases[0]["batch_size"] = rng.randrange(1, 50)
    batch = micro * rng.randrange(1, 9)
    train = TrainConfig(
        steps=3, sequence_length=length, batch_size=batch, micro_batch_size=rng.choice([None, micro]), extend=phases
    )
    model = PRESETS["nano"].model_copy(update={"max_position_embeddings": 4096})
    for stage in stages(RunConfig(model=model, train=train))[1:]:
        found = stage.config.train
        assert found.batch_size % found.micro_batch_size == 0
        limit = (train.micro_batch_size or batch) * length
        assert found.micro_batch_size == 1 or found.micro_batch_size * found.sequence_length <= limit
        larger = range(found.micro_batch_size + 1, found.batch_size + 1)
        assert not any(found.batch_size % size == 0 and size * found.sequence_length <= limit for size in larger)
    default = stages(RunConfig(model=model, train=train))[2].config.train
    assert default.batch_size == max(1, batch * length // default.sequence_length)


def test_stages_read_in_different_orders(recipe):
    seeds = [stage.config.train.seed for stage in stages(load_run_config(recipe(MINIMAL + PHASES)))]
    assert len(set(seeds)) == 3


def test_phases_survive_a_dump(recipe):
    config = load_run_config(recipe(MINIMAL + PHASES + "learning_rate = 1e-3\nbatch_size = 6\nmicro_batch_size = 3\n"))
    assert load_run_config(recipe(dump_toml(config))) == config


def test_phases_on_the_command_line(recipe):
    path = recipe(MINIMAL + PHASES)
    assert load_run_config(path, ["train.extend=[]"]).train.extend == ()
    changed = load_run_config(path, ["train.extend.1.steps=9", "train.extend.0.batch_size=2"]).train.extend
    assert [(phase.steps, phase.batch_size) for phase in changed] == [(5, 2), (9, None)]
    (whole,) = load_run_config(path, ["train.extend=[{sequence_length = 40, steps = 2}]"]).train.extend
    assert (whole.sequence_length, whole.steps) == (40, 2)


@pytest.mark.parametrize(("text", "said"), [
    ("train.extend.0.sequence_length=32", ["extend.0.sequence_length=32", "greater than 32, the length before it"]),
    ("train.extend.1.sequence_length=64", ["extend.1.sequence_length=64", "greater than 64"]),
    ("train.extend.1.stesp=3", ["train.extend.1.stesp = 3", "did you mean 'steps'"]),
    ("train.extend.0.steps=0", ["train.extend.0.steps = 0", "greater than 0"]),
    ("train.extend.0.learning_rate=0", ["train.extend.0.learning_rate = 0", "greater than 0"]),
    ("train.extend.2.steps=3", ["train.extend has 2 entries", "train.extend.NUMBER.KEY"]),
    ("train.extend.steps=3", ["train.extend has 2 entries"]),
    ("train.extend.1=3", ["train.extend has 2 entries"]),
    ("train.extend=3", ["train.extend = 3", "array"]),
    ("train.extend=[{steps=4}]", ["train.extend.0.sequence_length", "missing"]),
    ("train.extend.0.micro_batch_size=2", ["micro_batch_size needs batch_size"]),
    ("train.schedule.tail_factor=0", ["extend.0.learning_rate must be given"]),
    ("train.ema_span=0", ["train.ema_span = 0", "greater than 0"]),
    ("model.rope_scaling={factor = 2.0, original_max_position_embeddings = 32}",
     ["train.extend.1.sequence_length=96 must be at most 64", "model.rope_scaling.factor=2 times"]),
    ("model.rope_scaling={factor = 40.0, original_max_position_embeddings = 31}",
     ["train.sequence_length=32 must be at most 31"]),
])  # fmt: skip
def test_wrong_phases_are_refused(recipe, text, said):
    line = refusal(recipe(MINIMAL + PHASES), text)
    assert all(part in line for part in said), line


def test_passes_that_do_not_divide_a_phases_batch_are_refused(recipe):
    line = refusal(recipe(MINIMAL + PHASES + "batch_size = 6\nmicro_batch_size = 4\n"))
    assert "train.extend.1: micro_batch_size=4 must divide batch_size=6" in line


def test_an_average_is_given_once(recipe):
    assert "either ema_decay or ema_span" in refusal(recipe(MINIMAL), "train.ema_decay=0.5", "train.ema_span=0.1")
