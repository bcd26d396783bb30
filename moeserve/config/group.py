"""What a group of settings is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def described(cls, name: str) -> str:
        """What a field is, for a group that has another default for it."""
        return cls.model_fields[name].description or ""
