"""The base class of all settings, and the constrained types of their fields."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_NAME = 100
NAME = rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}$"
LIBRARIES = ("timm", "torchvision")  # whose networks are backbones, as LIBRARY:NAME
IMPORT_PATH = r"^\w+$|^\w+(\.\w+)*:\w+$"  # a name, or the user's own as package.module:name
MAX_INTEGER = 2**31 - 1
MAX_NAME_BYTES = 255  # of a file or folder
MAX_NUMBER = 1e6  # far above every sensible setting; its square is finite in float32

Ratio = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, le=MAX_NUMBER, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, le=MAX_NUMBER, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)]  # beyond it, KL is below rounding errors
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


def _check_parts(value: str) -> str:
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError(f"a part of it is longer than {MAX_NAME_BYTES} bytes, the limit of file systems")
    return value


Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", max_length=1000), AfterValidator(_check_parts)]


def _without_password(value: Any) -> Any:
    if "://" in str(value) and "@" in str(value):
        raise ValueError(
            "an address with a user or a password (an @) would appear in files and logs; give them in the environment, "
            "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return value


Address = Annotated[Text, BeforeValidator(_without_password)]  # a path, or an address such as s3://BUCKET/FOLDER


class Section(BaseModel):
    """A group of settings: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
