"""Problems are put to a model, and what it answers is judged: to learn from, and to see how often it is right."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benthic.config.posttrain import RlConfig
from benthic.data.chat import ChatFormat
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.score import share_score
from benthic.model import LanguageModel
from benthic.posttrain.grpo import differing
from benthic.posttrain.judge import Case, Judge, Trouble, Verdict, Weighted
from benthic.posttrain.problems import Problem, Source, open_sources, order
from benthic.posttrain.reward_model import Scorer, is_reward_model
from benthic.posttrain.rewards import is_reward
from benthic.posttrain.rollouts import Answers, Sampler


def open_judge(rl: RlConfig, sources: Sequence[Source]) -> Judge:
    """What judges answers to problems of these sources, but for reward models."""
    names = [reward.name for source in sources for reward in source.rewards]
    return Judge([name for name in names if not is_reward_model(name)], rl.reward_seconds)


class Asking:
    """The problems of some settings, and what answers to them are worth.

    Args:
        rl: the settings.
        tokenizer: the model's.
        context: tokens that the model takes, of prompt and answer together.
    """

    def __init__(self, rl: RlConfig, tokenizer: Tokenizer, context: int) -> None:
        self._rl, self._tokenizer, self._chat = rl, tokenizer, ChatFormat(tokenizer)
        self._longest = context - rl.max_new_tokens
        self.sources = open_sources(rl.problems, rl.held_out)
        self._judge = open_judge(rl, self.sources)
        rewards = [reward.name for source in self.sources for reward in source.rewards]
        self._scorers = {name: Scorer(name) for name in dict.fromkeys(rewards) if is_reward_model(name)}
        self._sampler: tuple[LanguageModel, Sampler] | None = None

    def problems(self, start: int, count: int) -> list[Problem]:
        """Those to learn from, from the one of this number on: sources in proportion to their weights."""
        weights = [problems.weight for problems in self._rl.problems]
        return [self.sources[source].training(number) for source, number in order(weights, start, count)]

    def sample(
        self, model: LanguageModel, problems: Sequence[Problem], seeds: Sequence[int], copies: int, temperature: float
    ) -> Answers:
        """``copies`` answers to each problem, one after another; a seed for each answer."""
        if self._sampler is None or self._sampler[0] is not model:
            sampler = Sampler(model, sorted(self._tokenizer.stop_ids), at_once=self._rl.at_once)
            self._sampler = (model, sampler)
        prompts = [self._chat.prompt(problem.messages) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) > self._longest:
                raise InputError(
                    f"posttrain.rl: a problem of {problem.source} has {len(prompt)} tokens, not {self._longest}"
                )
        return self._sampler[1].sample(
            prompts, seeds, copies=copies, max_new_tokens=self._rl.max_new_tokens, temperature=temperature
        )

    def verdicts(self, problems: Sequence[Problem], answers: Answers, copies: int) -> list[Verdict]:
        """An answer that has not been ended is worth nothing, whatever it says."""
        ended = answers.finished_N.nonzero()[:, 0].tolist()
        asked = [problems[number // copies] for number in ended]
        texts = [self._tokenizer.decode(answers.answer_ids(number)) for number in ended]
        cases = [
            Case(problem.prompt, text, problem.facts, [one for one in problem.rewards if one.name not in self._scorers])
            for problem, text in zip(asked, texts, strict=True)
        ]
        found = self._judge.judge_all(cases)
        for name, scorer in self._scorers.items():
            by_it = [number for number, problem in enumerate(asked) if name in (one.name for one in problem.rewards)]
            scores = scorer.scores([(asked[number].messages, texts[number]) for number in by_it])
            for number, score in zip(by_it, scores, strict=True):
                found[number] = _with_score(found[number], asked[number].rewards, name, score)
        verdicts = [Verdict(0.0, {}) for _ in answers.tokens_NT]
        for number, verdict in zip(ended, found, strict=True):
            verdicts[number] = verdict
        return verdicts

    def accuracy(self, model: LanguageModel, count: int, temperature: float) -> dict[str, Any]:
        """Share of problems held out whose answer gets all the reward there is, by source and of all."""
        found, every = dict[str, Any](), list[float]()
        for source in self.sources:
            problems = source.held_out[:count]
            answers = self.sample(model, problems, range(count), 1, temperature)
            worth = sum(abs(reward.weight) for reward in source.rewards)
            right = [float(verdict.value >= worth) for verdict in self.verdicts(problems, answers, 1)]
            found[source.name] = _share(right)
            every += right
        return {**found, "all": _share(every)}


def describe(
    problems: Sequence[Problem], answers: Answers, verdicts: Sequence[Verdict], reward_NG: Tensor
) -> dict[str, Any]:
    """What metrics say of new answers, G of them to each of N problems."""
    by_source: dict[str, list[float]] = {}
    for problem, values in zip(problems, reward_NG.mean(-1).tolist(), strict=True):
        by_source.setdefault(problem.source, []).append(values)
    troubles: dict[str, int] = {}
    for verdict in verdicts:
        for trouble in verdict.troubles.values():
            troubles[trouble] = troubles.get(trouble, 0) + 1
    length_N = answers.end_N - answers.prompt_N
    return {
        "reward": float(reward_NG.mean()),
        "reward_by_source": {name: math.fsum(values) / len(values) for name, values in by_source.items()},
        "groups_without_variance": int((~differing(reward_NG)).sum()),
        "answer_length": float(length_N.double().mean()),
        "unfinished": int((~answers.finished_N).sum()),
        "entropy": float(answers.entropy_NT.sum() / length_N.sum()),
        "answer_tokens": int(length_N.sum()),
        "reward_troubles": troubles,
    }


def _share(right: Sequence[float]) -> dict[str, Any]:
    score = share_score("accuracy", right)
    return {"value": score.value, "n": score.n, "ci95": score.ci95}


def _with_score(verdict: Verdict, rewards: Sequence[Weighted], name: str, score: float) -> Verdict:
    """A verdict with a reward model's score."""
    if not is_reward(score):
        troubles: dict[str, Trouble] = {**verdict.troubles, name: "not a number"}
        return Verdict(verdict.value, {**verdict.parts, name: 0.0}, troubles, f"{name}: {score}")
    weight = next(reward.weight for reward in rewards if reward.name == name)
    return Verdict(verdict.value + weight * score, {**verdict.parts, name: score}, verdict.troubles, verdict.why)
