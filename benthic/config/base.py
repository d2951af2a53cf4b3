"""What all settings share: they are frozen, unknown keys are errors, and a few ranges have names."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_passes(batch: int | None, micro: int | None) -> None:
    """Raises ValueError if passes of ``micro`` sequences do not make up a batch; None is whatever fits."""
    if batch is not None and micro is not None and batch % micro:
        raise ValueError(f"micro_batch_size={micro} must divide batch_size={batch}")
