"""Reinforcement learning as a stage of a run: answers are sampled, judged, and learnt from by GRPO.

The answers that a batch learns from are sampled with the weights as they are when it is asked for, and kept for as
many updates as the settings say. All that is drawn follows from seeds and from the number of the batch, so a resumed
stage goes on bit for bit; rewards are computed again only for answers that are sampled again.

Shapes: N answers, G answers of a group, T positions, M MoE layers, J depths of multi-token prediction.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benthic.config.schema import RlConfig, RunConfig
from benthic.data.chat import ChatFormat
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.score import share_score
from benthic.model import LanguageModel
from benthic.posttrain.grpo import Clipping, differing, group_advantages, policy_loss, token_weights
from benthic.posttrain.held_out import find_held_out
from benthic.posttrain.judge import Case, Judge, Trouble, Verdict, Weighted
from benthic.posttrain.policy import Policy, Seen
from benthic.posttrain.problems import Problem, Source, open_sources, order
from benthic.posttrain.reward_model import Scorer, fingerprint, is_reward_model
from benthic.posttrain.rewards import is_reward
from benthic.posttrain.rollouts import Answers, Sampler
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import Losses, Objective
from benthic.train.schedule import StepSettings
from benthic.train.state import Carried, TrainState
from benthic.train.work import Place, Spent, Validation

_FEW = 64
"""Answers that the reference reads at once."""


def settings_of(config: RunConfig) -> RlConfig:
    """The section of the settings, which must be there."""
    assert config.posttrain.rl is not None
    return config.posttrain.rl


class Rl:
    """The problems that a run's settings name."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def prepare(self, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
        """Problems are found, and rewards tried."""
        rl, tokenizer = settings_of(config), Tokenizer.load(self._out / "tokenizer")
        sources = open_sources(rl.problems, rl.held_out)
        for source in sources:
            longest = max(len(ChatFormat(tokenizer).prompt(problem.messages)) for problem in source.held_out)
            if longest + rl.max_new_tokens > config.model.max_position_embeddings:
                raise InputError(
                    f"posttrain.rl: prompts of {source.name} have up to {longest} tokens and max_new_tokens = "
                    f"{rl.max_new_tokens}; the model takes {config.model.max_position_embeddings}"
                )
        open_judge(rl, sources).close()
        marks = [source.fingerprint for source in sources]
        marks += [fingerprint(reward.name) for source in sources for reward in source.rewards]
        digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()
        return config, {"rl": digest, "tokenizer": tokenizer.fingerprint}

    def open(self, place: Place) -> "RlWork":
        """The stage over these problems."""
        return RlWork(place)


def open_judge(rl: RlConfig, sources: Sequence[Source]) -> Judge:
    """What judges answers to problems of these sources, but for reward models."""
    names = [reward.name for source in sources for reward in source.rewards]
    return Judge([name for name in names if not is_reward_model(name)], rl.reward_seconds)


class Rollouts(NamedTuple):
    """Answers with what they are worth."""

    answers: Answers
    reference_NT: Tensor | None
    """Log-probabilities by the model that the stage began with."""
    advantage_N: Tensor
    weight_NT: Tensor
    used: int = 0
    """Updates that have learnt from them."""


class RlWork:
    """GRPO on problems whose answers can be judged."""

    validates_first = True

    def __init__(self, place: Place) -> None:
        self._place, self._config = place, place.config
        self._rl = rl = settings_of(place.config)
        tokenizer = Tokenizer.load(place.out / "tokenizer")
        self._tokenizer, self._chat = tokenizer, ChatFormat(tokenizer)
        self._sources = open_sources(rl.problems, rl.held_out)
        self._judge = open_judge(rl, self._sources)
        rewards = [reward.name for source in self._sources for reward in source.rewards]
        self._scorers = {name: Scorer(name) for name in dict.fromkeys(rewards) if is_reward_model(name)}
        asked = [problem for source in self._sources for problem in source.held_out]
        self._held_out = find_held_out(place.config, place.out, tokenizer, asked)
        self.measure = self._held_out.measure
        self._clipping = Clipping(rl.clip_low, rl.clip_high, rl.kl_weight)
        self._reference: Policy | None = None
        self._sampler: tuple[LanguageModel, Sampler] | None = None
        self._rollouts: Rollouts | None = None
        self._spent = [Spent(0, 0.0)]
        self._figures: dict[str, Any] = {}

    def describe(self) -> str:
        """How many answers to how many problems of what."""
        rl, names = self._rl, ", ".join(source.name for source in self._sources)
        return f"{rl.group_size} answers to each of {rl.prompts} problems of {names}"

    # ------------------------------------------------------------------ a step

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> Rollouts:
        """Answers not used up, or new ones by the present weights."""
        assert isinstance(state.model, LanguageModel)
        self._figures = {}
        if self._rollouts is None or self._rollouts.used == self._rl.updates:
            self._rollouts = self._roll_out(state.model, first)
        found = self._rollouts
        self._rollouts = found._replace(used=found.used + 1)
        self._spend(found, sampled=found.used == 0, mtp=bool(settings.mtp_weight))
        return found

    def _roll_out(self, model: LanguageModel, first: int) -> Rollouts:
        begun, rl = time.perf_counter(), self._rl
        problems = self._problems(first // rl.group_size)
        seeds = [(rl.seed << 40) + first + number for number in range(rl.prompts * rl.group_size)]
        answers = self._sample(model, problems, seeds, rl.group_size, rl.temperature)
        sampled = time.perf_counter()
        verdicts = self._verdicts(problems, answers, rl.group_size)
        judged = time.perf_counter()
        reward_NG = torch.tensor([verdict.value for verdict in verdicts], dtype=torch.float64).view(-1, rl.group_size)
        advantage_N = group_advantages(reward_NG, deviation=rl.deviation).flatten().float()
        self._figures |= _described(problems, answers, verdicts, reward_NG)
        self._figures |= {"rollout_seconds": sampled - begun, "reward_seconds": judged - sampled}
        weight_NT = token_weights(answers.sampled_NT, rl.average, rl.max_new_tokens)
        return Rollouts(answers, self._by_reference(answers), advantage_N, weight_NT)

    def _problems(self, start: int) -> list[Problem]:
        weights = [problems.weight for problems in self._rl.problems]
        return [self._sources[source].training(number) for source, number in order(weights, start, self._rl.prompts)]

    def _sample(
        self, model: LanguageModel, problems: Sequence[Problem], seeds: Sequence[int], copies: int, temperature: float
    ) -> Answers:
        if self._sampler is None or self._sampler[0] is not model:
            sampler = Sampler(model, sorted(self._tokenizer.stop_ids), at_once=self._rl.at_once)
            self._sampler = (model, sampler)
        prompts = [self._chat.prompt(problem.messages) for problem in problems]
        limit = self._config.model.max_position_embeddings - self._rl.max_new_tokens
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) > limit:
                raise InputError(f"posttrain.rl: a problem of {problem.source} has {len(prompt)} tokens, not {limit}")
        return self._sampler[1].sample(
            prompts, seeds, copies=copies, max_new_tokens=self._rl.max_new_tokens, temperature=temperature
        )

    def _verdicts(self, problems: Sequence[Problem], answers: Answers, copies: int) -> list[Verdict]:
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

    @torch.no_grad()
    def _by_reference(self, answers: Answers) -> Tensor | None:
        if not self._rl.kl_weight:
            return None
        if self._reference is None:
            model = self._place.architecture.build(self._config.model, seed=0)
            model.load_state_dict(self._place.began_with())
            assert isinstance(model, LanguageModel)
            self._reference = Policy(model.requires_grad_(False), self._rl.temperature)
        reference_NT = torch.zeros(answers.tokens_NT.shape)
        for start in range(0, len(reference_NT), _FEW):
            rows = slice(start, start + _FEW)
            seen = _see(self._place.compute, self._reference, answers, rows, mtp=False)
            reference_NT[rows, : seen.logprob_NT.shape[1]] = seen.logprob_NT
        return reference_NT

    def gradients(
        self, objective: Objective, batch: Rollouts, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Of GRPO's loss, and of the MTP modules' on the same answers."""
        assert isinstance(objective.model, LanguageModel)
        policy, mtp = Policy(objective.model, self._rl.temperature), bool(settings.mtp_weight)
        batch = batch if self._rl.kl_weight else _with_advantage(batch)
        answers, counted = batch.answers, batch.answers.sampled_NT
        parts, totals = [], torch.zeros(5)
        for start in range(0, len(counted), micro_batch_size):
            rows = slice(start, start + micro_batch_size)
            seen = _see(compute, policy, answers, rows, mtp=mtp)
            width = seen.logprob_NT.shape[1]
            old_NT, weight_NT = answers.logprob_NT[rows, :width], batch.weight_NT[rows, :width]
            reference_NT = None if batch.reference_NT is None else batch.reference_NT[rows, :width]
            found = policy_loss(
                seen.logprob_NT, old_NT, reference_NT, batch.advantage_N[rows], weight_NT, self._clipping
            )
            depths = len(seen.mtp_nats_J)
            share_J = _further(counted[rows], depths) / _further(counted, depths).clamp_min(1)
            nats_J = seen.mtp_nats_J * share_J
            loss = found.loss + (settings.mtp_weight * nats_J.mean() if len(nats_J) else 0.0)
            loss.backward()
            new_NT = seen.logprob_NT.detach()
            apart_NT = (new_NT - old_NT).abs()
            totals[:4] += torch.stack([found.loss.detach(), found.kl, found.clipped, apart_NT.sum() / counted.sum()])
            totals[4] = torch.maximum(totals[4], apart_NT.max())
            nats = -new_NT.sum() / counted.sum()
            parts.append((torch.cat([nats[None], nats_J.detach()]), seen.load_ME))
        loss, kl, clipped, apart, furthest = totals.tolist()
        self._figures |= {"loss": loss, "kl": kl, "clip_share": clipped}
        if not batch.used:
            self._figures |= {"mismatch": furthest, "mean_mismatch": apart}
        nats_K, load_ME = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return Losses(nats_K, torch.zeros(()), load_ME)

    def figures(self) -> dict[str, Any]:
        """Of the loss, and of the answers where they are new."""
        return self._figures

    def _spend(self, rollouts: Rollouts, *, sampled: bool, mtp: bool) -> None:
        """Operations of an update: three forward passes' worth, and one each for sampling and for the reference."""
        tokens, longest = int(rollouts.answers.end_N.sum()), int(rollouts.answers.end_N.max())
        flops_of = self._place.architecture.training_flops
        flops = tokens * flops_of(self._config.model, longest, mtp=mtp)
        if sampled:
            passes = 1 + (rollouts.reference_NT is not None)
            flops += passes * tokens * flops_of(self._config.model, longest, mtp=False) / 3
        before = self._spent[-1]
        self._spent = [before, Spent(before.tokens + tokens, before.flops + flops)]

    def spent(self, step: int) -> Spent:
        """Tokens of prompts and answers, as often as they were learnt from."""
        return self._spent[-1]

    # ------------------------------------------------------------------ validation

    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Accuracy on problems held out, of the likeliest and of sampled answers; and whatever text is held out."""
        assert isinstance(state.model, LanguageModel)
        count = self._rl.held_out if last else min(self._rl.held_out_quick, self._rl.held_out)
        found = self._held_out.validate(state, None if last else self._config.train.validation_tokens)
        likeliest, sampled = (self._accuracy(state.model, count, heat) for heat in (0.0, self._rl.temperature))
        return Validation(found.bits_per_byte, {**found.row, "accuracy": likeliest, "sampled_accuracy": sampled})

    def _accuracy(self, model: LanguageModel, count: int, temperature: float) -> dict[str, Any]:
        """Share of problems held out whose answer gets all the reward there is, by source and of all."""
        found, every = dict[str, Any](), list[float]()
        for source in self._sources:
            problems = source.held_out[:count]
            answers = self._sample(model, problems, range(count), 1, temperature)
            worth = sum(abs(reward.weight) for reward in source.rewards)
            right = [float(verdict.value >= worth) for verdict in self._verdicts(problems, answers, 1)]
            found[source.name] = _share(right)
            every += right
        return {**found, "all": _share(every)}

    # ------------------------------------------------------------------ resumption

    def carry(self) -> Carried:
        """Answers not used up, and what has been spent."""
        numbers: dict[str, Any] = {"tokens": self._spent[-1].tokens, "flops": self._spent[-1].flops}
        kept = self._rollouts
        if kept is None or kept.used == self._rl.updates:
            return Carried({}, numbers)
        tensors = {**kept.answers._asdict(), "advantage_N": kept.advantage_N, "weight_NT": kept.weight_NT}
        if kept.reference_NT is not None:
            tensors["reference_NT"] = kept.reference_NT
        return Carried(tensors, {**numbers, "used": kept.used})

    def restore(self, carried: Carried, source: str) -> None:
        """Become what was saved. Raises InputError, naming ``source``, if it does not fit."""
        tensors, numbers = dict(carried.tensors), carried.numbers
        try:
            self._spent = [Spent(int(numbers["tokens"]), float(numbers["flops"]))]
            if not tensors:
                self._rollouts = None
                return
            answers = Answers(*(tensors.pop(name) for name in Answers._fields))
            reference_NT = tensors.pop("reference_NT") if self._rl.kl_weight else None
            self._rollouts = Rollouts(answers, reference_NT, used=int(numbers["used"]), **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: does not hold what this stage carries ({error})") from None


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


def _with_advantage(rollouts: Rollouts) -> Rollouts:
    """Answers that pull in either direction; all, if none does. Without a reference the others change nothing."""
    kept_N = rollouts.advantage_N != 0
    if not kept_N.any():
        return rollouts
    answers = Answers(*(column[kept_N] for column in rollouts.answers))
    return rollouts._replace(
        answers=answers, advantage_N=rollouts.advantage_N[kept_N], weight_NT=rollouts.weight_NT[kept_N]
    )


def _see(compute: Compute, policy: Policy, answers: Answers, rows: slice, *, mtp: bool) -> Seen:
    """Some answers, without padding that none of them needs; their tokens go to the experts that they went to."""
    end_N = answers.end_N[rows]
    width = int(end_N.max())
    sampled_NT = answers.sampled_NT[rows, :width]
    chosen_MNTK = answers.experts_NTMK[rows, : width - 1].permute(2, 0, 1, 3).long().contiguous()
    seen: Seen = compute_in(compute, policy, answers.tokens_NT[rows, :width], sampled_NT, end_N, chosen_MNTK, mtp)
    return seen


def _further(sampled_NT: Tensor, depths: int) -> Tensor:
    """How many sampled tokens each MTP depth predicts (J,): not those too near the beginning of their row."""
    return torch.tensor([int(sampled_NT[:, depth + 1 :].sum()) for depth in range(1, depths + 1)])


def _described(
    problems: Sequence[Problem], answers: Answers, verdicts: Sequence[Verdict], reward_NG: Tensor
) -> dict[str, Any]:
    """What metrics say of new answers."""
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
