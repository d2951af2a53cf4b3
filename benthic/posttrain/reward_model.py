"""A reward that is learnt from preferences: the trunk of a language model with a scalar in the place of its head.

Of two answers to one conversation, the one that people preferred is to score higher: the loss is that of Bradley and
Terry, -log sigmoid(chosen - rejected) (arXiv 2203.02155, section 3.5, with pairs). The V3 report (section 5.2.1) has a
model-based reward where no rule tells right from wrong.

Shapes: N answers, P pairs, T positions, D model width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.config.load import load_run_config
from benthic.config.schema import ModelConfig
from benthic.data.chat import ChatFormat
from benthic.data.chat_template import Message
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import sha256
from benthic.model import Routing, Trainable, Transformer
from benthic.plan.flops import training_flops
from benthic.train.checkpoint import copy_into, latest, load

STAGE = "reward"
_AT_ONCE = 32
"""Answers that are scored together."""


class RewardModel(Trainable):
    """Conversations to scalars: the head, of one row, reads the state at the last token."""

    transformer: Transformer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.transformer.head = nn.Linear(config.hidden_size, 1, bias=False)
        self.mtp = nn.ModuleList()

    def training_hidden(
        self, tokens_BS: Tensor, document_BS: Tensor | None = None, *, depths: int | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """What the head reads; there are no MTP modules."""
        hidden_BTD, routings = self.transformer.hidden(tokens_BS, document_BT=document_BS)
        return [hidden_BTD], routings

    def forward(self, tokens_NT: Tensor, end_N: Tensor) -> Tensor:
        """A scalar for each row (N,), of which ``end_N`` tokens count."""
        hidden_NTD = self.transformer.hidden(tokens_NT)[0]
        last_ND = hidden_NTD[torch.arange(len(end_N), device=end_N.device), end_N - 1]
        score_N1: Tensor = self.transformer.head(last_ND)
        return score_N1[:, 0].float()


class RewardArchitecture:
    """Reward models, as :class:`benthic.train.architecture.Architecture` has kinds of models."""

    def build(self, config: ModelConfig) -> RewardModel:
        """A model whose weights are not set yet."""
        return RewardModel(config)

    def training_flops(self, config: ModelConfig, length: int, *, mtp: bool) -> float:
        """Those of a language model, whose head is larger."""
        return training_flops(config, length, mtp=False)

    def settings(self) -> dict[str, Any]:
        """What tells it from a language model."""
        return {"head": "scalar"}


def trunk_weights(model: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """What a reward model begins with: a language model's trunk, and a head that says 0 of everything."""
    kept = {name: tensor for name, tensor in model.items() if not name.startswith("mtp.")}
    return {**kept, "transformer.head.weight": torch.zeros(1, width)}


def preference_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected), in nats; ln 2 where nothing is known."""
    return -F.logsigmoid(chosen_P - rejected_P).mean()


def padded(sequences: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids as rows of one length (N, T), and how many of each count (N,)."""
    end_N = torch.tensor([len(ids) for ids in sequences])
    tokens_NT = torch.full((len(sequences), int(end_N.max())), padding)
    for row, ids in enumerate(sequences):
        tokens_NT[row, : len(ids)] = torch.tensor(ids)
    return tokens_NT, end_N


class Scorer:
    """A trained reward model with its tokenizer.

    Raises:
        InputError: ``path`` is not a directory that ``benthic reward`` has written, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path = Path(path)
        newest = latest(path / "checkpoints" / STAGE)
        if newest is None:
            raise InputError(f"{path}: holds no reward model; give a directory that `benthic reward` has written")
        config = load_run_config(path / "config.toml").model
        self._model = RewardModel(config).eval().requires_grad_(False)
        checkpoint = load(newest, groups=("model",))
        copy_into(self._model.state_dict(), checkpoint.tensors["model"], f"{newest}/model.safetensors")
        self._tokenizer = Tokenizer.load(path / "tokenizer")
        self._chat, self._longest = ChatFormat(self._tokenizer), config.max_position_embeddings

    @torch.no_grad()
    def scores(self, answered: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """A scalar for each answer to its conversation. Of one too long for the model, the end is read."""
        sequences = [
            self._chat.sample([*messages, {"role": "assistant", "content": answer}]).ids[-self._longest :]
            for messages, answer in answered
        ]
        found: list[float] = []
        for start in range(0, len(sequences), _AT_ONCE):
            tokens_NT, end_N = padded(sequences[start : start + _AT_ONCE], self._tokenizer.eos_id)
            found += self._model(tokens_NT, end_N).tolist()
        return found


def is_reward_model(name: str) -> bool:
    """Whether a reward's name is the directory of a reward model."""
    return (Path(name) / "checkpoints" / STAGE).is_dir()


def fingerprint(name: str) -> str:
    """A reward's name, and what a reward model of that name holds."""
    newest = latest(Path(name) / "checkpoints" / STAGE)
    return name if newest is None else f"{name} {sha256(newest / 'manifest.json')}"
