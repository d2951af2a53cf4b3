"""DeepSeek-V3's architecture in plain single-device PyTorch."""

from benthic.model.language_model import LanguageModel, build_model
from benthic.model.moe import Routing
from benthic.model.trainable import Trainable, Trunk
from benthic.model.transformer import Transformer

__all__ = ["LanguageModel", "Routing", "Trainable", "Transformer", "Trunk", "build_model"]
