"""The numbers of runs as rows of a table: a name, and one text for each run."""

from fitune.planning.memory import outside_allocator
from fitune.planning.sizes import GIB
from fitune.report.run_files import RunFiles, is_number

NOTHING = "–"
HARDWARE = {
    "gpu": "GPU", "gpus": "GPUs", "gpu_memory_gib": "memory of a GPU, GiB", "host_memory_gib": "host RAM, GiB",
    "cores": "CPU cores",
}  # fmt: skip
"How the page says what origin.json calls so."
Row = tuple[str, list[str]]


def key_figures(runs: list[RunFiles], price_per_hour: float | None) -> list[Row]:
    """What one wants to know first. A row that no run has a value for is left out."""
    rows = [
        ("state", _state),
        ("training loss, last", lambda run: _last(run, "loss", ".4f")),
        ("held-out loss while training, last", lambda run: _last(run, "eval_loss", ".4f")),
        ("held-out loss, lowest", _lowest),
        *_evaluations(runs),
        ("tokens/s, all GPUs", _speed),
        ("tokens/s per GPU", lambda run: _number(run.measurements.get("tokens_per_second_per_gpu"), ",.0f")),
        (
            "GPU memory, torch's peak, GiB",
            _gpu_peak,
        ),
        ("host RAM, peak, GiB", lambda run: _number(measured_host(run), ".2f")),
        ("loading, s", lambda run: _number(run.measurements.get("load_seconds"), ".1f")),
        ("training time", lambda run: _duration(run.hours)),
    ]
    if price_per_hour is not None:
        rows.append((f"cost of the training time, at {price_per_hour:g} an hour", _cost(price_per_hour)))
    table = [(name, [value(run) for run in runs]) for name, value in rows]
    return [(name, texts) for name, texts in table if any(text != NOTHING for text in texts)]


def memory_table(run: RunFiles) -> list[Row]:
    """GiB, planned and measured; empty where the run has no plan."""
    plan, measured = run.plan, run.measurements
    if plan is None:
        return []
    rows = []
    if plan.gpu:
        loading = _over_ranks(run, max, "peak_allocated_gib")
        total = plan.gpu.total / GIB
        reserved = total - outside_allocator(plan.setup) / GIB
        rows += [
            ("one GPU: allocated by torch while loading", plan.gpu.phases["load"] / GIB, loading),
            ("one GPU: allocated by torch, peak", plan.gpu.allocated / GIB, measured.get("peak_allocated_gib")),
            ("one GPU: reserved by torch, peak", reserved, measured.get("peak_reserved_gib")),
            ("one GPU: all, with CUDA's context and kernels", total, None),
        ]
    host = {phase: sum(parts.values()) / GIB for phase, parts in plan.host.items()}
    rows += [
        ("host: while loading", host["load"], _over_ranks(run, sum, "peak_host_rss_gib")),
        ("host: peak", max(host.values()), measured_host(run)),
    ]
    return [(name, [_number(planned, ".2f"), _number(found, ".2f")]) for name, planned, found in rows]


def measured_host(run: RunFiles) -> float | None:
    """GiB of all ranks' processes together, those of other machines too."""
    peaks = [rank.get("peak_host_rss_gib") for rank in run.measurements.get("ranks", [])]
    return sum(peaks) if peaks and all(map(is_number, peaks)) else None


def measured_on_gpu(run: RunFiles) -> dict[str, float]:
    """GiB that torch allocated on the fullest GPU, by when; empty on the CPU."""
    found = {
        "while loading": _over_ranks(run, max, "peak_allocated_gib"),
        "whole run": run.measurements.get("peak_allocated_gib"),
    }
    return {name: value for name, value in found.items() if value}


def measured_on_host(run: RunFiles) -> dict[str, float]:
    """GiB of all ranks' processes, by when."""
    found = {"while loading": _over_ranks(run, sum, "peak_host_rss_gib"), "whole run": measured_host(run)}
    return {name: value for name, value in found.items() if value}


def settings(run: RunFiles) -> dict[str, str]:
    """run.yaml with dots between the keys, such as `recipe.training.learning_rate`."""
    return {key: _text(value) for key, value in _flat(run.run.model_dump(mode="json"))}


def origin_rows(run: RunFiles) -> dict[str, str]:
    """Versions, hardware and hashes."""
    origin, rows = run.origin, {"fitune": run.run.fitune}
    rows |= {str(name): str(version) for name, version in origin.get("versions", {}).items()}
    rows |= {HARDWARE.get(key, key): _text(value) for key, value in _flat(origin.get("hardware", {}))}
    return rows | {f"{key} (SHA-256)" if len(str(value)) == 64 else key: _text(value)
                   for key, value in _flat(origin.get("identity", {}))}  # fmt: skip


def data_rows(data: dict) -> list[tuple[str, str]]:
    """The report of `prepare`, shortly."""
    tokens = data.get("tokens") or {}
    source = data.get("source") or {}
    names = {
        "rows read": data.get("rows_in"), "rows kept": data.get("rows_kept"), "rows cut": data.get("rows_cut"),
        "training rows": data.get("train_rows"), "held-out rows": data.get("test_rows"),
        "packed rows": data.get("packed_rows"), "steps an epoch": data.get("steps_per_epoch"),
        "tokens": tokens.get("total"), "tokens of a row, median": tokens.get("p50"),
        "tokens of a row, 95th percentile": tokens.get("p95"), "tokens of a row, most": tokens.get("max"),
    }  # fmt: skip
    rows = [("source", str(source["dataset"]))] if source.get("dataset") else []
    rows += [("mixed in", str(other.get("dataset"))) for other in data.get("mixed_in") or []]
    rows += [(name, f"{value:,}") for name, value in names.items() if is_number(value)]
    shares = {"tokens trained": tokens.get("trained_share"), "positions used": data.get("packing_efficiency")}
    return rows + [(name, f"{value:.1%}") for name, value in shares.items() if is_number(value)]


def _state(run: RunFiles) -> str:
    if run.finished:
        early = ", stopped early" if run.finished.get("stopped_early") else ""
        best = run.finished.get("result_step")
        of_best = f"; result: step {best:,}, the best evaluation" if best else ""
        return f"finished after {run.step:,} steps{early}{of_best}"
    asked = f" of {run.steps_asked:,}" if run.steps_asked else ""
    return f"unfinished: step {run.step:,}{asked}" if run.lines else "nothing logged yet"


def _last(run: RunFiles, key: str, how: str) -> str:
    points = run.series(key)
    return f"{points[-1][1]:{how}}" if points else NOTHING


def _lowest(run: RunFiles) -> str:
    points = run.series("eval_loss")
    if len(points) < 2:
        return NOTHING
    step, loss = min(points, key=lambda point: point[1])
    return f"{loss:.4f} at step {step:,}"


def _gpu_peak(run: RunFiles) -> str:
    return _number(run.measurements.get("peak_allocated_gib") or None, ".2f")  # 0 on the CPU


def _evaluations(runs: list[RunFiles]) -> list[tuple]:
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    return [
        (f"{name}: {measure.replace('_', ' ')}, base to tuned", _evaluation(name, measure))
        for name in names
        for measure in ("loss", "perplexity", "token_accuracy")
    ]


def _evaluation(name: str, measure: str):
    how = {"loss": ".4f", "perplexity": ",.2f", "token_accuracy": ".1%"}[measure]

    def text(run: RunFiles) -> str:
        parts = run.evaluations.get(name, {}).values()
        measured = [metrics.get(measure) for metrics in parts if isinstance(metrics, dict)]
        return " → ".join(_number(value, how) for value in measured) or NOTHING

    return text


def _speed(run: RunFiles) -> str:
    measured = _number(run.measurements.get("tokens_per_second") or None, ",.0f")
    if measured == NOTHING:
        measured = _last(run, "tokens_per_second", ",.0f")
    planned = run.plan and run.plan.time
    return f"{measured} (planned on {planned.gpu}: {planned.tokens_per_second:,.0f})" if planned else measured


def _over_ranks(run: RunFiles, join, key: str) -> float | None:
    found = [rank.get("loading", {}).get(key) for rank in run.measurements.get("ranks", [])]
    return join(found) if found and all(map(is_number, found)) else None


def _duration(hours: float | None) -> str:
    if hours is None:
        return NOTHING
    return f"{hours:.2f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def _cost(price_per_hour: float):
    return lambda run: NOTHING if run.hours is None else f"{run.hours * price_per_hour:,.2f}"


def _number(value, how: str) -> str:
    return f"{value:{how}}" if is_number(value) else NOTHING


def _flat(value: dict, prefix: str = ""):
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _text(value, most: int = 500) -> str:
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        value = ", ".join(map(str, value))
    text = {None: NOTHING, True: "true", False: "false"}.get(value) if value in (None, True, False) else str(value)
    text = str(value) if is_number(value) else text
    text = NOTHING if text in ("", "{}") else text
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"
