"""What all settings share: they are frozen, unknown keys are errors, and a few ranges have names."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Settings(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, settings: Any) -> Any:
        """TOML has no null: ``"none"`` takes back what a preset or a recipe says, where no text may stand anyway."""
        if not isinstance(settings, dict):
            return settings
        none = [key for key, value in settings.items() if isinstance(value, str) and value == "none"]
        return settings | {key: None for key in none if cls._takes_none(key)}

    @classmethod
    def _takes_none(cls, key: str) -> bool:
        kinds = get_args(cls.model_fields[key].annotation) if key in cls.model_fields else ()
        return type(None) in kinds and str not in kinds


def check_passes(batch: int | None, micro: int | None) -> None:
    """Raises ValueError if passes of ``micro`` sequences do not make up a batch; None is whatever fits."""
    if batch is not None and micro is not None and batch % micro:
        raise ValueError(f"micro_batch_size={micro} must divide batch_size={batch}")
