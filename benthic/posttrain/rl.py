"""Reinforcement learning as a stage of a run: answers are sampled, judged, and learnt from by GRPO.

The answers that a batch learns from are sampled with the weights as they are when it is asked for, and kept for as
many updates as the settings say. All that is drawn follows from seeds and from the number of the batch, so a resumed
stage goes on bit for bit; rewards are computed again only for answers that are sampled again.

Shapes: N answers, G answers of a group, T positions.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benthic.config.posttrain import RlConfig
from benthic.config.schema import RunConfig
from benthic.data.chat import ChatFormat
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.model import LanguageModel
from benthic.posttrain.asking import Asking, describe, open_judge
from benthic.posttrain.grpo import Clipping, group_advantages, token_weights
from benthic.posttrain.held_out import find_held_out
from benthic.posttrain.policy import Policy
from benthic.posttrain.problems import open_sources
from benthic.posttrain.rehearsal import borrowed, open_rehearsal
from benthic.posttrain.reward_model import fingerprint
from benthic.posttrain.rollout_gradients import Rollouts, backward, distinct, see, with_advantage
from benthic.posttrain.rollouts import Answers
from benthic.precision.compute import Compute
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
        hashes = {"rl": digest, "tokenizer": tokenizer.fingerprint}
        return config, hashes | borrowed(config, self._out, tokenizer, rl.mtp_rehearsal)

    def open(self, place: Place) -> "RlWork":
        """The stage over these problems."""
        return RlWork(place)


class RlWork:
    """GRPO on problems whose answers can be judged."""

    validates_first = True

    def __init__(self, place: Place) -> None:
        self._place, self._config = place, place.config
        self._rl = rl = settings_of(place.config)
        tokenizer = Tokenizer.load(place.out / "tokenizer")
        self._asking = Asking(rl, tokenizer, place.config.model.max_position_embeddings)
        asked = [problem for source in self._asking.sources for problem in source.held_out]
        self._held_out = find_held_out(place.config, place.out, tokenizer, asked)
        self.measure = self._held_out.measure
        self._rehearsal = open_rehearsal(place.config, place.out, tokenizer, rl.mtp_rehearsal, conversations=True)
        self._step = 0
        self._clipping = Clipping(rl.clip_low, rl.clip_high, rl.kl_weight)
        self._reference: Policy | None = None
        self._rollouts: Rollouts | None = None
        self._spent = Spent(0, 0.0)
        self._figures: dict[str, Any] = {}

    def describe(self) -> str:
        """How many answers to how many problems of what."""
        rl, names = self._rl, ", ".join(source.name for source in self._asking.sources)
        return f"{rl.group_size} answers to each of {rl.prompts} problems of {names}"

    # ------------------------------------------------------------------ a step

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> Rollouts:
        """Answers not used up, or new ones by the present weights."""
        assert isinstance(state.model, LanguageModel)
        self._figures, self._step = {}, state.step
        if self._rollouts is None or self._rollouts.used == self._rl.updates:
            self._rollouts = self._roll_out(state.model, first)
        found = self._rollouts
        self._rollouts = found._replace(used=found.used + 1)
        self._spend(found.answers, passes=3, mtp=bool(settings.mtp_weight))
        return found

    def _roll_out(self, model: LanguageModel, first: int) -> Rollouts:
        begun, rl = time.perf_counter(), self._rl
        problems = self._asking.problems(first // rl.group_size, rl.prompts)
        seeds = [(rl.seed << 40) + first + number for number in range(rl.prompts * rl.group_size)]
        answers = self._asking.sample(model, problems, seeds, rl.group_size, rl.temperature)
        sampled = time.perf_counter()
        verdicts = self._asking.verdicts(problems, answers, rl.group_size)
        judged = time.perf_counter()
        reward_NG = torch.tensor([verdict.value for verdict in verdicts], dtype=torch.float64).view(-1, rl.group_size)
        advantage_N = group_advantages(reward_NG, deviation=rl.deviation).flatten().float()
        self._figures |= describe(problems, answers, verdicts, reward_NG)
        self._figures |= {"rollout_seconds": sampled - begun, "reward_seconds": judged - sampled}
        self._spend(answers, passes=1, mtp=False)
        weight_NT = token_weights(answers.sampled_NT, rl.average, rl.max_new_tokens)
        found = distinct(Rollouts(answers, None, advantage_N, weight_NT))
        return found._replace(reference_NT=self._by_reference(found.answers)) if rl.kl_weight else with_advantage(found)

    @torch.no_grad()
    def _by_reference(self, answers: Answers) -> Tensor:
        """Log-probabilities by the model that the stage began with."""
        if self._reference is None:
            model = self._place.architecture.build(self._config.model)
            model.load_state_dict(self._place.began_with())
            assert isinstance(model, LanguageModel)
            self._reference = Policy(model.requires_grad_(False), self._rl.temperature)
        reference_NT = torch.zeros(answers.tokens_NT.shape)
        for start in range(0, len(reference_NT), _FEW):
            rows = slice(start, start + _FEW)
            seen = see(self._place.compute, self._reference, answers, rows, mtp=False)
            reference_NT[rows, : seen.logprob_NT.shape[1]] = seen.logprob_NT
        self._spend(answers, passes=1, mtp=False)
        return reference_NT

    def gradients(
        self, objective: Objective, batch: Rollouts, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Of GRPO's loss, and of the MTP modules' on the same answers."""
        assert isinstance(objective.model, LanguageModel)
        policy = Policy(objective.model, self._rl.temperature)
        losses, figures = backward(
            policy, batch, self._clipping, settings.mtp_weight, micro_batch_size=micro_batch_size, compute=compute
        )
        self._figures |= figures
        if self._rehearsal is not None:
            found = self._rehearsal.rehearse(objective.model, self._step, compute)
            self._figures["rehearsal"] = found
            self._spent = self._spent._replace(flops=self._spent.flops + self._rehearsal.flops)
        return losses

    def figures(self) -> dict[str, Any]:
        """Of the loss, and of the answers where they are new."""
        return self._figures

    def _spend(self, answers: Answers, *, passes: int, mtp: bool) -> None:
        """Operations of so many forward passes, of which an update is worth three; tokens are those learnt from."""
        tokens, longest = int(answers.end_N.sum()), int(answers.end_N.max())
        flops = passes / 3 * tokens * self._place.architecture.training_flops(self._config.model, longest, mtp=mtp)
        self._spent = Spent(self._spent.tokens + (tokens if passes == 3 else 0), self._spent.flops + flops)

    def spent(self, step: int) -> Spent:
        """Tokens of prompts and answers, as often as they were learnt from."""
        return self._spent

    # ------------------------------------------------------------------ validation

    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Accuracy on problems held out, of the likeliest and of sampled answers; and whatever text is held out."""
        assert isinstance(state.model, LanguageModel)
        count = self._rl.held_out if last else min(self._rl.held_out_quick, self._rl.held_out)
        found = self._held_out.validate(state, None if last else self._config.train.validation_tokens)
        likeliest, sampled = (self._asking.accuracy(state.model, count, heat) for heat in (0.0, self._rl.temperature))
        return Validation(found.bits_per_byte, {**found.row, "accuracy": likeliest, "sampled_accuracy": sampled})

    # ------------------------------------------------------------------ resumption

    def carry(self) -> Carried:
        """Answers not used up, and what has been spent."""
        numbers: dict[str, Any] = self._spent._asdict()
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
            self._spent = Spent(int(numbers["tokens"]), float(numbers["flops"]))
            if not tensors:
                self._rollouts = None
                return
            answers = Answers(*(tensors.pop(name) for name in Answers._fields))
            reference_NT = tensors.pop("reference_NT") if self._rl.kl_weight else None
            self._rollouts = Rollouts(answers, reference_NT, used=int(numbers["used"]), **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: does not hold what this stage carries ({error})") from None
