"""Base class of the tables of ``site.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Place = Annotated[Path, Field(strict=False)]
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


def validate_config(value: Any) -> Any:
    """A whole number, for literals, which compare by ``==``, for which True and 1.0 are 1."""
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


class Section(BaseModel):
    """Base of the tables: nothing unknown inside, no value converted, nothing changed later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _toml_arrays(cls, value: Any) -> Any:
        # Strict as it is, TOML has no other way to write a tuple.
        if not isinstance(value, dict):
            return value
        return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
