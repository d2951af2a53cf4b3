"""What an engine has done so far, counted where it happens; each field is one of :class:`EngineStats`."""

from dataclasses import dataclass, field
from typing import get_args

from benthic.inference.request import FinishReason


def _none_finished() -> dict[FinishReason, int]:
    return dict.fromkeys(get_args(FinishReason), 0)


@dataclass
class Figures:
    """Counters, and the drafts of the last step."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    draft_depth: float = 0.0
    finished: dict[FinishReason, int] = field(default_factory=_none_finished)
