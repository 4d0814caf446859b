"""The type that all bodies are of."""

from __future__ import annotations

import pydantic


class Strict(pydantic.BaseModel):
    """No field but those it names, no value of another type, and nobody changes it."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
