"""What the fields of recipes, memory profiles and accelerate configs have in common: strict models, and their types."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Method = Literal["full", "lora", "qlora"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[float, Field(gt=0)]
"Infinite where it does not matter, as the RAM of a machine that is only asked about."
YES_OR_NO = {"yes": True, "on": True, "no": False, "off": False}
"Words that YAML files and `--set` keep as they are written (`fitune.config.yaml_file`)."
Flag = Annotated[bool, BeforeValidator(lambda value: YES_OR_NO.get(str(value).lower(), value))]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
