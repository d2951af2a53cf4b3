"""Texts as vectors: the mean of the model's hidden states after the final norm, over all tokens of a text.

These models are trained to predict text, not to compare it; the vectors are what they have to offer, no more. They are
not scaled to length 1.
"""

import base64
from collections.abc import Sequence
from threading import Event
from typing import Any

import torch
from torch import Tensor

from benthic.model import LanguageModel
from benthic.serve.errors import bad
from benthic.serve.models import Served
from benthic.serve.prompts import text_ids
from benthic.serve.requests import MAX_PROMPTS, EmbeddingRequest

MAX_TOKENS = 300_000
"""Of all texts in a request, as in OpenAI's API."""


def embed(served: Served, asked: EmbeddingRequest, gone: Event) -> dict[str, Any]:
    """The answer. Blocks; stops between two texts once ``gone`` is set. Raises 400."""
    width = served.model.config.hidden_size
    if asked.dimensions not in (None, width):
        raise bad(f"dimensions: this model's vectors have {width}", "dimensions")
    if len(asked.inputs) > MAX_PROMPTS:
        raise bad(f"input: {len(asked.inputs)} texts; at most {MAX_PROMPTS}", "input")
    texts = [text_ids(served, given, "input") for given in asked.inputs]
    if (total := sum(map(len, texts))) > MAX_TOKENS:
        raise bad(f"input: {total} tokens; at most {MAX_TOKENS} in all", "input")
    vectors = [mean_hidden(served.model, ids) for ids in texts if not gone.is_set()]
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector_D, asked.encoding_format)}
        for index, vector_D in enumerate(vectors)
    ]
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


@torch.inference_mode()
def mean_hidden(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Mean (D,) in fp32 of the hidden states after the final norm."""
    transformer = model.transformer
    tokens_BT = torch.tensor([ids], device=transformer.embed.weight.device)
    return transformer.hidden(tokens_BT)[0][0].float().mean(dim=0)


def _encoded(vector_D: Tensor, encoding: str | None) -> Any:
    values = vector_D.cpu().numpy()
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if encoding == "base64" else values.tolist()
