"""The whole model as it is trained and stored: the transformer with its MTP modules composed onto it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.model.initial import initialise
from benthic.model.mla import AttentionContext
from benthic.model.moe import Routing
from benthic.model.mtp import MTPModule
from benthic.model.trainable import Trainable
from benthic.model.transformer import Transformer, attention_context

_SHARE_OF_STATE = 0.3
"""Of the state before it that a module adds to an embedding, where it begins as the last layer."""


class LanguageModel(Trainable):
    """A transformer and ``num_nextn_predict_layers`` MTP modules that share its embedding and head."""

    transformer: Transformer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.num_nextn_predict_layers))

    @torch.no_grad()
    def mtp_as_last_layer(self) -> list[str]:
        """Let the MTP modules become what the last layer and its norm are; returns the names of what has changed.

        A module reads the embedding of the token it is given as the first layer would, and a share of the state before
        it. So at first it guesses like a model of that one layer, and not at random. One whose layer is of another
        kind (dense, where the module has experts) keeps its layer.
        """
        last, norm = self.transformer.layers[-1], self.transformer.norm
        for module in self.mtp:
            assert isinstance(module, MTPModule)
            if module.block.state_dict().keys() == last.state_dict().keys():
                module.block.load_state_dict(last.state_dict())
            module.norm.load_state_dict(norm.state_dict())
            identity = torch.eye(module.project.out_features).to(module.project.weight)
            module.project.weight.copy_(torch.cat((identity, _SHARE_OF_STATE * identity), 1))
        return [name for name, _ in self.named_parameters() if name.startswith("mtp.")]

    def forward(self, tokens_BT: Tensor, **context: Any) -> Tensor:
        """Logits of the next token (B, T, V)."""
        logits_BTV: Tensor = self.transformer(tokens_BT, **context)
        return logits_BTV

    def training_hidden(
        self, tokens_BS: Tensor, document_BS: Tensor | None = None, *, depths: int | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        modules = list(self.mtp[:depths])
        length = tokens_BS.shape[1] - len(modules)
        tokens_BT = tokens_BS[:, :length]
        document_BT = None if document_BS is None else document_BS[:, :length]
        hidden_BTD, routings = self.transformer.hidden(tokens_BT, document_BT=document_BT)
        context = attention_context(self.config, tokens_BT, document_BT)
        states, further = mtp_states(modules, self.transformer.embed, hidden_BTD, tokens_BS, context)
        return states, routings + further


def mtp_states(
    modules: Sequence[nn.Module], embed: nn.Embedding, hidden_BTD: Tensor, tokens_BS: Tensor, context: AttentionContext
) -> tuple[list[Tensor], list[Routing]]:
    """The main model's hidden states, followed by those of the MTP modules after it, and what routers of these did.

    Args:
        tokens_BS: T tokens and as many more as there are modules.
        context: of the first T tokens.
    """
    states, routings = [hidden_BTD], list[Routing]()
    for depth, module in enumerate(modules, start=1):
        embedding_BTD = embed(tokens_BS[:, depth : depth + hidden_BTD.shape[1]])
        hidden_BTD, routing = module(hidden_BTD, embedding_BTD, context)
        states.append(hidden_BTD)
        routings += [] if routing is None else [routing]
    return states, routings


def build_model(
    config: ModelConfig, *, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A model with fresh weights: normal with ``initializer_range``, norms 1, router bias 0 (V3 report section 4.2).

    On the ``meta`` device nothing is allocated.
    """
    with torch.device(device or "cpu"):
        model = LanguageModel(config)
    if dtype is not None:
        cast_parameters(model, dtype)
    if torch.device(device or "cpu").type != "meta":
        initialise(model, config.initializer_range, seed)
    return model


def cast_parameters(model: LanguageModel, dtype: torch.dtype) -> None:
    """Parameters to ``dtype``; the routers' bias, a buffer, stays in fp32, for it moves in steps of a thousandth."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
