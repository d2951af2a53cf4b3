"""The schedule against the values DeepSeek-V3's report publishes, at the moments it publishes."""

import math
from bisect import bisect_right

import pytest

from benthic.config.load import load_run_config
from benthic.config.schema import ScheduleConfig
from benthic.config.stages import stages
from benthic.train.schedule import Course, StepSettings, batch_share, steps_per_full_batch

TOKENS, LENGTH, BATCH, PEAK = 14.8e12, 4096, 15360, 2.2e-4


@pytest.fixture(scope="module")
def course() -> Course:
    train = load_run_config("v3-671b").train
    assert (train.sequence_length, train.batch_size, train.optimizer.learning_rate) == (LENGTH, BATCH, PEAK)
    return Course(train.schedule, train.steps, train.batch_size)


def at(course: Course, fraction: float) -> StepSettings:
    """Settings of the step that reads the sequence at this fraction of the run."""
    return course.at(bisect_right(range(course.steps), fraction * course.sequences, key=course.sequences_before) - 1)


def rate(course: Course, tokens: float) -> float:
    return PEAK * at(course, tokens / TOKENS).learning_rate_factor


def test_the_published_run_takes_the_steps_its_ramp_asks_for(course):
    ramped = ScheduleConfig(batch_ramp=469e9 / TOKENS)
    assert course.steps == round(TOKENS / LENGTH / BATCH * steps_per_full_batch(ramped))


def test_the_published_run_reads_its_tokens(course):
    assert course.sequences * LENGTH == pytest.approx(TOKENS, rel=1e-4)


def test_warm_up_is_linear_over_two_thousand_steps(course):
    for step in (1, 500, 1000, 2000):
        assert PEAK * course.at(step - 1).learning_rate_factor == pytest.approx(PEAK * step / 2000)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1e12, 2.2e-4),
        (9.99e12, 2.2e-4),
        (10e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),
        (11.075e12, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (14.299e12, 2.2e-5),
        (14.4e12, 2.2e-5),
        (14.632e12, 2.2e-5),
        (14.634e12, 7.3e-6),
        (14.8e12, 7.3e-6),
    ],
)
def test_learning_rate(course, tokens, expected):
    assert rate(course, tokens) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 3072), (234.5e9, 9216), (469e9, 15360), (5e12, 15360)])
def test_batch_ramp(course, tokens, batch):
    assert at(course, tokens / TOKENS).batch_size == pytest.approx(batch, abs=3)


@pytest.mark.parametrize(
    ("tokens", "speed", "mtp"),
    [
        (1e12, 0.001, 0.3),
        (9.999e12, 0.001, 0.3),
        (10.001e12, 0.001, 0.1),
        (14.299e12, 0.001, 0.1),
        (14.301e12, 0.0, 0.1),
    ],
)
def test_bias_speed_and_mtp_weight(course, tokens, speed, mtp):
    settings = at(course, tokens / TOKENS)
    assert (settings.bias_speed, settings.mtp_weight) == (speed, mtp)


@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_steps_read_every_sequence_once_in_whole_micro_batches(ramp, multiple):
    course = Course(ScheduleConfig(batch_ramp=ramp), steps=57, batch_size=40, multiple=multiple)
    position = 0
    for step in range(57):
        settings = course.at(step)
        assert settings.first_sequence == position == course.sequences_before(step)
        assert settings.batch_size % multiple == 0
        assert settings.batch_size > 0
        position += settings.batch_size
    assert position == course.sequences
    assert course.at(56).batch_size == pytest.approx(40, abs=2 * multiple)


def test_batch_share_starts_and_ends_where_it_says():
    schedule = ScheduleConfig(batch_ramp=0.5, batch_ramp_start=0.25)
    assert [batch_share(schedule, x) for x in (0.0, 0.25, 0.5, 1.0)] == [0.25, 0.625, 1.0, 1.0]


def test_a_run_without_warm_up_starts_at_its_peak():
    assert Course(ScheduleConfig(warmup=0), 10, 4).at(0).learning_rate_factor == 1.0


def test_what_the_published_recipe_holds_throughout(course):
    optimizer = load_run_config("v3-671b").train.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == (
        "adamw", (0.9, 0.95), 0.1, 1.0,
    )  # fmt: skip
    assert {course.at(step).balance_weight for step in (0, 1000, 100_000, course.steps - 1)} == {1e-4}


@pytest.mark.parametrize(
    ("tokens", "before", "after"),
    [
        (14.3e12, (0.1, 0.001), (0.1, 0.0)),
        (14.633e12, (0.1, 0.0), (7.3 / 220, 0.0)),
    ],
)
def test_each_tail_begins_with_the_step_that_its_tokens_begin(course, tokens, before, after):
    first = next(
        step for step in range(course.steps) if course.sequences_before(step) / course.sequences >= tokens / TOKENS
    )
    for step, expected in ((first - 1, before), (first, after)):
        settings = course.at(step)
        assert (settings.learning_rate_factor, settings.bias_speed) == pytest.approx(expected, abs=1e-6)


def test_the_published_run_goes_on_with_longer_sequences(course):
    _, *phases = stages(load_run_config("v3-671b"))
    ends = rate(course, TOKENS)
    for stage, (length, sequences) in zip(phases, ((32 * 1024, 1920), (128 * 1024, 480)), strict=True):
        train = stage.config.train
        phase = Course(train.schedule, train.steps, train.batch_size)
        assert (phase.steps, train.sequence_length) == (1000, length)
        assert {phase.at(step).batch_size for step in range(1000)} == {sequences}
        rates = {train.optimizer.learning_rate * phase.at(step).learning_rate_factor for step in range(1000)}
        assert rates == {7.3e-6}
        assert ends == pytest.approx(7.3e-6, rel=1e-12)


@pytest.mark.parametrize("steps", [400, 7000])
def test_one_recipe_serves_a_small_run_and_the_published_one(course, steps):
    """Three million tokens: 400 steps of batches that grow from 12 to 60 sequences of 128."""
    small = Course(course.schedule, steps, 60)
    assert small.sequences == pytest.approx(steps * 60 / steps_per_full_batch(course.schedule), rel=0.01)
    for percent in range(4, 100):
        ours, theirs = (at(run, percent / 100) for run in (small, course))
        assert ours.learning_rate_factor == pytest.approx(theirs.learning_rate_factor, abs=1e-3 + 5 / steps)
        assert (ours.mtp_weight, ours.bias_speed) == (theirs.mtp_weight, theirs.bias_speed)
        assert ours.batch_size / 60 == pytest.approx(theirs.batch_size / BATCH, abs=0.03)


@pytest.mark.parametrize(("early", "late"), [(0.0, 0.3), (0.3, 0.0), (0.3, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("late_start", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("every", [1, 4])
def test_sequences_with_mtp_are_those_of_steps_where_it_counts(early, late, late_start, every):
    settings = {"mtp_loss_weight": early, "mtp_late_loss_weight": late, "mtp_late_start": late_start, "batch_ramp": 0.4}
    course, each = (Course(ScheduleConfig(**settings, mtp_every=n), 37, 8) for n in (every, 1))
    counted = 0
    for step in range(37):
        assert course.sequences_with_mtp(step) == counted
        assert course.at(step).mtp_weight == (each.at(step).mtp_weight if step % every == every - 1 else 0.0)
        counted += course.at(step).batch_size if course.at(step).mtp_weight else 0
    assert course.sequences_with_mtp(37) == counted
