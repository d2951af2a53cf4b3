"""What training and validation ask of a language model, so that others than this package's can go through them.

Shapes: B batch, T time, D model, S = T + depths tokens.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from benthic.model.moe import Routing


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Of the parameters that turn tokens into states."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding))


class Trunk(nn.Module, ABC):
    """A model from its tokens to the state that its head reads."""

    embed: nn.Embedding
    head: nn.Linear

    @abstractmethod
    def hidden(self, tokens_BT: Tensor, *, document_BT: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """States after the final norm (B, T, D), and what each MoE layer did; attention stays within documents."""


class Trainable(nn.Module, ABC):
    """A trunk and the modules that predict further tokens with its embedding and head, of which there may be none."""

    transformer: Trunk
    mtp: nn.ModuleList
    copies: frozenset[str] = frozenset()
    """Names of weights that another process has too, and counts as its own."""

    @abstractmethod
    def training_hidden(
        self, tokens_BS: Tensor, document_BS: Tensor | None = None, *, depths: int | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """States ready for the head, of the main model and its first MTP modules, over the first T = S - depths tokens.

        Args:
            tokens_BS: T tokens and as many more as MTP modules take part.
            document_BS: document of each token; attention then stays within documents.
            depths: MTP modules that take part; by default all.

        Returns:
            depths + 1 tensors (B, T, D): the k-th predicts token i + k + 1 at position i; and one
            :class:`Routing` per MoE layer, those of MTP modules last.
        """
