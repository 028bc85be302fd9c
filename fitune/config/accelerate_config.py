"""Reads and checks a file of accelerate_configs/.

accelerate ignores an unknown key inside `fsdp_config` without a word (`fsdp_offload_parms: true` leaves offload off),
so every key is checked here before anything is launched.
"""

from pathlib import Path

from fitune.config.installed_names import accelerate_config_keys, accelerate_fsdp_keys
from fitune.config.schema import AUTO, AccelerateConfig
from fitune.config.yaml_file import parse, read_yaml
from fitune.errors import UsageError, nearest

USED_FSDP_KEYS = {"fsdp_version", "fsdp_offload_params", "fsdp_reshard_after_forward", "fsdp_state_dict_type"}
DEFAULT_PORT = 29500
"On machine 0, where there are several."
IGNORED_FSDP_KEYS = {
    "fsdp_activation_checkpointing": "set kept_layers in the memory profile",
    "fsdp_activation_checkpointing_offload": "set activation_offload in the memory profile",
}


def read_accelerate_config(path: Path) -> AccelerateConfig:
    """What fitune needs of an accelerate config. Raises UsageError naming the file and key."""
    data = read_yaml(path)
    for key in data:
        if key not in accelerate_config_keys():
            raise UsageError(f"{path}: unknown key '{key}'{nearest(key, accelerate_config_keys())}")
    fsdp = _checked_fsdp_block(data.get("fsdp_config") or {}, path)
    use_cpu = data.get("use_cpu", False)
    if data.get("distributed_type") != "FSDP":
        raise UsageError(f"{path}: distributed_type must be FSDP, not {data.get('distributed_type')!r}")
    if "num_processes" not in data:
        raise UsageError(f"{path}: key 'num_processes' is missing")
    values = {
        "path": str(path),
        "num_processes": data["num_processes"],
        "num_machines": data.get("num_machines", 1),
        "main_process_ip": data.get("main_process_ip"),
        "main_process_port": data.get("main_process_port"),
        "gpu_ids": _gpu_ids(data, path),
        "use_cpu": use_cpu,
        "mixed_precision": data.get("mixed_precision", "no"),
        "offload_params": fsdp.get("fsdp_offload_params", False),
        "reshard_after_forward": fsdp.get("fsdp_reshard_after_forward", AUTO),
    }
    config = parse(AccelerateConfig, values, str(path))
    if config.num_processes % config.num_machines:
        raise UsageError(
            f"{path}: num_processes {config.num_processes} can't be spread evenly over num_machines "
            f"{config.num_machines}; make it a multiple"
        )
    if not use_cpu and config.mixed_precision != "bf16":
        raise UsageError(f"{path}: mixed_precision must be bf16 on GPUs: packed rows have no kernel in float32")
    return config


def _gpu_ids(data: dict, path: Path) -> str | None:
    """None: all that are visible. accelerate takes text alone, and YAML reads a single number as no text."""
    given = data.get("gpu_ids")
    if given is not None and not isinstance(given, str):
        raise UsageError(f'{path}: gpu_ids must be text, not {given!r}; write gpu_ids: "{given}"')
    return None if given == "all" else given


def _checked_fsdp_block(fsdp: dict, path: Path) -> dict:
    for key in fsdp:
        if key not in accelerate_fsdp_keys():
            hint = nearest(key, USED_FSDP_KEYS, within="fsdp_config.")
            raise UsageError(f"{path}: unknown key 'fsdp_config.{key}'{hint}")
        if key not in USED_FSDP_KEYS:
            why = IGNORED_FSDP_KEYS.get(key, "fitune shards and loads the model itself")
            raise UsageError(f"{path}: fsdp_config.{key} has no effect here: {why}; remove it")
    if fsdp.get("fsdp_reshard_after_forward") == AUTO:
        raise UsageError(
            f"{path}: fsdp_config.fsdp_reshard_after_forward must be true or false, not 'auto', which accelerate does "
            f"not know; without the line plan chooses"
        )
    if fsdp and fsdp.get("fsdp_version") != 2:
        raise UsageError(f"{path}: fsdp_config.fsdp_version must be 2, not {fsdp.get('fsdp_version')!r}")
    if fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT") != "SHARDED_STATE_DICT":
        raise UsageError(
            f"{path}: fsdp_config.fsdp_state_dict_type must be SHARDED_STATE_DICT: each rank saves its part"
        )
    return fsdp


def written_out(config: AccelerateConfig) -> str:
    """The text of an accelerate config that starts the same processes."""
    lines = ["distributed_type: FSDP", "fsdp_config:", "  fsdp_version: 2"]
    lines += ["  fsdp_offload_params: true"] if config.offload_params else []
    is_said = config.reshard_after_forward != AUTO
    lines += [f"  fsdp_reshard_after_forward: {str(config.reshard_after_forward).lower()}"] if is_said else []
    lines += ["use_cpu: true"] if config.use_cpu else [f"mixed_precision: {config.mixed_precision}"]
    lines += [f"num_processes: {config.num_processes}"]
    lines += [f'gpu_ids: "{config.gpu_ids}"  # the others stay idle'] if config.gpu_ids else []
    if config.num_machines > 1:
        lines += [
            f"num_machines: {config.num_machines}",
            "machine_rank: 0  # train --machine-rank 1 on the second machine",
            f"main_process_ip: {config.main_process_ip or 'null'}  # train --main-process-ip ADDRESS on all of them",
            f"main_process_port: {config.main_process_port or DEFAULT_PORT}  # the same on all of them",
        ]
    else:
        port = config.main_process_port
        lines += [f"main_process_port: {port}" if port else "main_process_port: 0  # any free port"]
    return "\n".join(lines) + "\n"
