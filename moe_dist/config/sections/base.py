"""What every section is."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Choice:
    """One of these names, or `package.module:Class` of a person's own. What that is nobody asks before it is built."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, value: str) -> str:
        module, _, attribute = value.partition(":")
        is_a_path = attribute.isidentifier() and module.replace(".", "_").isidentifier()
        if value not in self.names and not is_a_path:
            near = difflib.get_close_matches(value, self.names, n=1)
            raise ValueError(f"{self}; did you mean {near[0]}?" if near else str(self))
        return value

    def __str__(self) -> str:
        names = f"one of {', '.join(self.names)}, or " if self.names else ""
        return f"{names}package.module:Class of your own"


OwnClass = Annotated[str, AfterValidator(Choice())]
RUNS_CODE = object()
"""Beside a type: a value may name a `package.module:Class` of a person's own, whatever else it may be."""


class Section(BaseModel):
    """A section of the tree: unknown keys are errors, docstrings are the reference manual."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
    )
