"""Training a reward model as a stage of a run of its own, on pairs of a preferred and another answer."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benthic.config.posttrain import RewardModelConfig
from benthic.config.schema import RunConfig
from benthic.data.chat import ChatFormat
from benthic.data.chat_template import Message
from benthic.data.text_files import RecordError, read_records
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.score import share_score
from benthic.files import sha256
from benthic.posttrain.problems import NO_PROMPT, are_messages
from benthic.posttrain.reward_model import RewardModel, padded, preference_loss
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import Losses, Objective
from benthic.train.schedule import StepSettings
from benthic.train.state import NOTHING, Carried, TrainState
from benthic.train.work import Place, Spent, Validation

_AT_ONCE = 32


class Pair(NamedTuple):
    """Token ids of a conversation with the answer that was preferred, and with the other."""

    chosen: list[int]
    rejected: list[int]


class Preferences:
    """The pairs that a run's settings name."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def prepare(self, config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
        """Pairs are read once, and epochs become steps."""
        reward = settings_of(config)
        tokenizer = Tokenizer.load(self._out / "tokenizer")
        pairs = read_pairs(config, tokenizer)
        if reward.epochs is not None:
            steps = -(-reward.epochs * (len(pairs) - reward.held_out) // reward.batch_size)
            reward = reward.model_copy(update={"steps": steps, "epochs": None})
            config = config.model_copy(update={"posttrain": config.posttrain.model_copy(update={"reward": reward})})
        files = hashlib.sha256("".join(sha256(Path(file)) for file in reward.pairs).encode()).hexdigest()
        return config, {"reward": files, "tokenizer": tokenizer.fingerprint}

    def open(self, place: Place) -> "PreferenceWork":
        """The stage over the pairs that are not held out."""
        return PreferenceWork(place)


def settings_of(config: RunConfig) -> RewardModelConfig:
    """The section of the settings, which must be there."""
    assert config.posttrain.reward is not None
    return config.posttrain.reward


def read_pairs(config: RunConfig, tokenizer: Tokenizer) -> list[Pair]:
    """All pairs in order. Raises InputError that names the file and place of one that cannot be used."""
    reward, chat, found = settings_of(config), ChatFormat(tokenizer), list[Pair]()
    for file in reward.pairs:
        for item in read_records(Path(file), lambda record: _pair(record, chat)):
            if not isinstance(item, Pair):
                raise InputError(f"{item.file}: byte {item.offset}: {item.reason}")
            if (longest := max(map(len, item))) > config.model.max_position_embeddings:
                raise InputError(
                    f"{file}: pair {len(found) + 1} has {longest} tokens; the model takes "
                    f"{config.model.max_position_embeddings}"
                )
            found.append(item)
    if len(found) <= reward.held_out:
        raise InputError(
            f"posttrain.reward: {len(found)} pairs, held_out = {reward.held_out} of which leave none to learn from"
        )
    return found


def _pair(record: Any, chat: ChatFormat) -> Pair:
    """``{"messages" or "prompt", "chosen", "rejected"}``."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("chosen", "rejected")):
        raise RecordError('no text under "chosen" and "rejected"')
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    if not are_messages(messages):
        raise RecordError(NO_PROMPT)
    return Pair(*(_ids(messages, record[key], chat) for key in ("chosen", "rejected")))


def _ids(messages: Sequence[Message], answer: str, chat: ChatFormat) -> list[int]:
    return chat.sample([*messages, {"role": "assistant", "content": answer}]).ids


class PreferenceWork:
    """Which of two answers was preferred."""

    measure = "bits for each held-out preference (1 where nothing is known)"
    validates_first = True

    def __init__(self, place: Place) -> None:
        self._place, reward = place, settings_of(place.config)
        tokenizer = Tokenizer.load(place.out / "tokenizer")
        pairs = read_pairs(place.config, tokenizer)
        self._pairs, self._held_out = pairs[: -reward.held_out], pairs[-reward.held_out :]
        self._seed, self._padding = reward.seed, tokenizer.eos_id
        self._files = ", ".join(reward.pairs)
        self._figures: dict[str, Any] = {}
        self._spent = Spent(0, 0.0)

    def describe(self) -> str:
        """Pairs, and their files."""
        return f"{self._place.config.train.batch_size} of {len(self._pairs)} pairs of {self._files}"

    def batch(self, state: TrainState, settings: StepSettings, first: int) -> list[Pair]:
        """Pairs ``first`` and following of an endless stream in which every epoch is shuffled."""
        numbers = range(first, first + settings.batch_size)
        batch = [self._pairs[self._place_of(number)] for number in numbers]
        tokens = sum(len(ids) for pair in batch for ids in pair)
        longest = max(len(ids) for pair in batch for ids in pair)
        flops = tokens * self._place.architecture.training_flops(self._place.config.model, longest, mtp=False)
        self._spent = Spent(self._spent.tokens + tokens, self._spent.flops + flops)
        return batch

    def _place_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self._pairs))
        return int(np.random.default_rng([self._seed, epoch]).permutation(len(self._pairs))[place])

    def gradients(
        self,
        objective: Objective,
        batch: list[Pair],
        settings: StepSettings,
        *,
        micro_batch_size: int,
        compute: Compute,
    ) -> Losses:
        """Of Bradley and Terry's loss."""
        total, right, routers = torch.zeros(()), 0, len(objective.routers)
        for start in range(0, len(batch), micro_batch_size):
            part = batch[start : start + micro_batch_size]
            chosen_P, rejected_P = self._scores(objective.model, part, compute)
            loss = preference_loss(chosen_P, rejected_P) * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
            right += int((chosen_P > rejected_P).sum())
        self._figures = {"preferred": right / len(batch)}
        experts = self._place.config.model.n_routed_experts
        return Losses(total[None], torch.zeros(()), torch.ones(routers, experts, dtype=torch.int64))

    def _scores(self, model: Any, pairs: Sequence[Pair], compute: Compute) -> tuple[Tensor, Tensor]:
        assert isinstance(model, RewardModel)
        tokens_NT, end_N = padded([ids for pair in pairs for ids in pair], self._padding)
        score_N: Tensor = compute_in(compute, model, tokens_NT, end_N)
        return score_N[0::2], score_N[1::2]

    def figures(self) -> dict[str, Any]:
        """Share of the batch's pairs in which the preferred answer scored higher."""
        return self._figures

    def spent(self, step: int) -> Spent:
        """Tokens of both answers with their conversations."""
        return self._spent

    @torch.no_grad()
    def validate(self, state: TrainState, *, last: bool) -> Validation:
        """Loss and accuracy on the pairs held out."""
        nats, right = 0.0, list[float]()
        for start in range(0, len(self._held_out), _AT_ONCE):
            part = self._held_out[start : start + _AT_ONCE]
            chosen_P, rejected_P = self._scores(state.model, part, "fp32")
            nats += float(preference_loss(chosen_P, rejected_P)) * len(part)
            right += (chosen_P > rejected_P).double().tolist()
        score = share_score("preferred", right)
        bits = nats / len(self._held_out) / math.log(2)
        return Validation(
            bits, {"preference_bits": bits, "preferred": {"value": score.value, "n": score.n, "ci95": score.ci95}}
        )

    def carry(self) -> Carried:
        """What has been spent."""
        return Carried({}, self._spent._asdict())

    def restore(self, carried: Carried, source: str) -> None:
        """Raises InputError if it is not there."""
        try:
            self._spent = Spent(int(carried.numbers["tokens"]), float(carried.numbers["flops"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{source}: does not hold what this stage carries") from None
        if carried.tensors != NOTHING.tensors:
            raise InputError(f"{source}: holds what a stage of another kind carries")
