"""Balance between experts by an auxiliary loss over the whole batch, which the published bias took the place of.

The loss of GShard and Switch (arXiv 2101.03961 section 2.2): that of :func:`benthic.ops.routing.sequence_balance_loss`
with all sequences of a micro-batch taken as one. It asks for less than balance within each sequence, and reached the
loss of balancing by bias in V3's ablation (V3 report section 4.5.3), so it is the fairer opponent.
"""

from typing import Any

from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.model import LanguageModel, Routing
from benthic.train.architecture import DeepSeekV3


class BatchBalanced(LanguageModel):
    """A language model whose balance loss is over the batch. It computes and stores what any other does."""

    def training_hidden(
        self, tokens_BS: Tensor, document_BS: Tensor | None = None, *, depths: int | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """As of any language model, but the routings are of one long sequence."""
        states, routings = super().training_hidden(tokens_BS, document_BS, depths=depths)
        return states, [as_one_sequence(routing) for routing in routings]


def as_one_sequence(routing: Routing) -> Routing:
    """The same choices, those of the second sequence following the first's and so on."""
    return Routing(routing.scores.flatten(0, 1)[None], routing.index.flatten(0, 1)[None])


class BatchBalance(DeepSeekV3):
    """The architecture to give to :func:`benthic.train.loop.train`."""

    def build(self, config: ModelConfig) -> BatchBalanced:
        """A model that gets the weights that any other gets from a seed."""
        return BatchBalanced(config)

    def settings(self) -> dict[str, Any]:
        """The kind."""
        return {"kind": "balance over the batch"}
