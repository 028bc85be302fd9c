"""config.json and generation_config.json of what is written: the base's own, readable by older loaders too."""

from pathlib import Path

from fitune.config.json_file import read_json

GENERATION_CONFIG = "generation_config.json"
DEFAULT_ROPE_THETA = 10000.0
"What transformers 4.x takes where config.json has no `rope_theta`."


def config_for_loaders(config: dict, dtype: str) -> dict:
    """The base's config.json for weights in full precision of `dtype`; the dict that is given stays as it is.

    transformers 5 keeps rotary positions under `rope_parameters`; 4.x, vLLM and llama.cpp's converter read `rope_theta`
    and `rope_scaling`, and take a default where they find none. All three are written.
    """
    result = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    result |= {"dtype": dtype, "use_cache": True} | ({"torch_dtype": dtype} if "torch_dtype" in config else {})
    return result | _rope(config)


def is_misread_by_older(config: dict) -> bool:
    """Whether transformers 4.x takes other rotary positions for a base than its `rope_parameters` say."""
    read = {"rope_theta": config.get("rope_theta", DEFAULT_ROPE_THETA), "rope_scaling": config.get("rope_scaling")}
    return isinstance(config.get("rope_parameters"), dict) and read | _rope(config) != read


def _rope(config: dict) -> dict:
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if isinstance(parameters, dict):
        theta = parameters.get("rope_theta", config.get("rope_theta"))
        rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if rest.get("rope_type", "default") == "default":
            rest = None
        return {} if theta is None else {"rope_theta": theta, "rope_scaling": rest}
    if "rope_theta" not in config:
        return {}
    of_scaling = dict(scaling or {})
    kind = of_scaling.pop("rope_type", of_scaling.pop("type", "default"))
    return {"rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": kind, **of_scaling}}


def generation_config(*folders: Path, stop_ids: list[int] = (), default_stop: int | list[int] | None = None) -> dict:
    """The fields of the folders' generation_config.json, later ones before earlier, with every token that they stop at.

    `stop_ids` are added; `default_stop` stands in where no folder names one.
    """
    result, stop = {}, []
    for folder in folders:
        file = folder / GENERATION_CONFIG
        found = read_json(file, "remove it or write it again") if file.exists() else {}
        result |= found
        stop += _as_list(found.get("eos_token_id"))
    result["eos_token_id"] = list(dict.fromkeys([*(stop or _as_list(default_stop)), *stop_ids]))
    return result


def _as_list(value) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
