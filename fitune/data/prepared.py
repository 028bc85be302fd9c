"""The folder that `prepare` wrote: whether it fits the recipe that is to be trained on it, and its tokens, mapped."""

import hashlib
import itertools
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fitune.config.command_name import command
from fitune.config.recipe import Data, Recipe
from fitune.data.chat_template import template_hash, tokenizer_hash
from fitune.data.conversations import quote
from fitune.data.dataset import TokenisedRows
from fitune.data.packing import Layout, lay_out
from fitune.data.token_file import IGNORED, TokenFile
from fitune.data.tokenise import tokenise_lines
from fitune.errors import UsageError
from fitune.output_folder import new_folder

REPORT = "report.json"
REPORT_VERSION = 4
"Of prepared data, raised when the same rows would be prepared in another way."
SPLITS = ("train", "test")
CHOOSE_ROWS = (
    *("revision", "train_split", "test_split", "test_fraction", "columns", "keep", "ignored_keys", "weight", "mix"),
)
"Keys of a recipe's `data:` that say which rows are taken."


def check_prepared(recipe: Recipe, tokenizer, *, is_trained: bool = False, again: str | None = None) -> dict | None:
    """The report of prepared data; None for files that were put there by hand, without a report.json.

    `is_trained`: the recipe is that of a run that was trained, so its template can no longer be chosen. `again` is the
    command that prepares the data anew.

    `tokenizer` is a transformers tokenizer after `apply_chat_template_choice`. Raises UsageError if the data was
    prepared by another version of fitune, or with another tokenizer, chat template, system message or `train_on` than
    the recipe's, or if a row has more tokens than its `max_length`: training would cut its last answer.
    """
    folder, data = Path(recipe.data.prepared), recipe.data
    report = read_report(folder)
    if report is None:
        return None
    elsewhere = ("--output", "FOLDER") if is_trained else ("--output", folder, "--overwrite")  # others' rows stay
    again = f"prepare the data again: {again or command('prepare', 'RECIPE', *elsewhere)}"
    used_now = {"tokenizer": tokenizer_hash(tokenizer), "template": template_hash(tokenizer)}
    for name, now in used_now.items():
        before = report[name]["sha256"]
        if before is not None and before != now:
            if name == "tokenizer":
                raise UsageError(f"{folder}: prepared with another tokenizer; {again}")
            choice = report["template"]["choice"]
            typed = shlex.quote(f"data.chat_template={choice}")
            as_prepared = "" if is_trained or choice == data.chat_template else f"add --set {typed}, or "
            raise UsageError(
                f"{folder}: prepared with another chat template ({choice}, not {data.chat_template}); "
                f"{as_prepared}{again}"
            )
    for name, now in (("system_message", data.system_message), ("train_on", data.train_on)):
        if report[name] != now:
            raise UsageError(f"{folder}: prepared with {name} {_shown(report[name])}, not {_shown(now)}; {again}")
    longest = report["longest_conversation"] or 0
    if longest > recipe.max_length:
        raise UsageError(
            f"{folder}: its longest conversation has {longest:,} tokens, max_length is {recipe.max_length:,}; drop or "
            f"cut longer ones: {again} --max-length {recipe.max_length} --long-rows drop"
        )
    return report


def chosen_by(data: Data) -> dict:
    """What a recipe says of which rows are taken, in JSON's types; what flags of `prepare` stand in for is left out."""
    return data.model_dump(mode="json", include=set(CHOOSE_ROWS))


def refuse_rows_chosen_otherwise(data: Data, again: str) -> None:
    """Raises UsageError where rows of the recipe's dataset were prepared by other settings than `data` has now.

    Rows of another dataset, and those of earlier versions, do not say by which.
    """
    folder = Path(data.prepared)
    report = read_report(folder)
    if not report or "chosen_by" not in report or dataset_in(folder, data):
        return
    before, now = _by_place(report["chosen_by"]), _by_place(chosen_by(data))
    for place, wanted in now.items():
        was = before.get(place, wanted)
        same_file = place.endswith(".dataset") and _seen_from(report, was) == Path(wanted).resolve()
        if was != wanted and not same_file:
            said = f"{place} {_shown(was)}, not {_shown(wanted)}"
            raise UsageError(f"{folder}: prepared with {said}; prepare the data again: {again}")


def _by_place(chosen: dict) -> dict[str, object]:
    """Settings by where they stand, `data.mix[0].keep`; first of all how many sources there are."""
    sources = chosen["mix"]
    found = {"sources in data.mix:": len(sources)} | {f"data.{key}": chosen[key] for key in chosen if key != "mix"}
    return found | {f"data.mix[{i}].{key}": value for i, source in enumerate(sources) for key, value in source.items()}


def changed_sources(folder: Path) -> list[str]:
    """The local files that rows of a prepared folder were read from, and that have other contents since."""
    report = read_report(folder)
    if not report:
        return []
    made = (folder / REPORT).stat().st_mtime_ns
    files = {_seen_from(report, name): sha256 for source in (report["source"], *report["mixed_in"])
             for name, sha256 in source["files"].items()}  # fmt: skip
    touched = [file for file in files if file.is_file() and file.stat().st_mtime_ns > made]
    return [str(file) for file in touched if _sha256(file) != files[file]]


def read_report(folder: Path) -> dict | None:
    """report.json, None where there is none. Raises UsageError for one that this version did not write."""
    file = folder / REPORT
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["version"] != REPORT_VERSION:
            raise UsageError(
                f"{folder}: prepared by another version of fitune; prepare the data again with --overwrite"
            )
        for key in ("tokenizer", "template", "system_message", "train_on", "longest_conversation", "source", "files"):
            report[key]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: not a report of prepare ({error}); prepare the data again with --overwrite"
        ) from None
    return report


def dataset_in(folder: Path, data: Data) -> str | None:
    """The dataset that a prepared folder holds, where it is another than the recipe's `data` names."""
    report = read_report(folder)
    there = report["source"]["dataset"] if report else data.dataset
    return None if there == data.dataset or _seen_from(report, there) == Path(data.dataset).resolve() else there


def _seen_from(report: dict, path: str) -> Path:
    """A path of a report, which starts where `prepare` ran; those of earlier versions from here on."""
    return (Path(report.get("working_folder", "")) / path).resolve()


def describe_files(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of what `prepare` wrote, by name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".arrow"))
    with ThreadPoolExecutor() as threads:
        sums = list(threads.map(_sha256, paths))
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256} for path, sha256 in zip(paths, sums, strict=True)
    }


def sha256_of_rows(folder: Path, split: str) -> str:
    """SHA-256 of SPLIT.jsonl. Taken from the report where the file was not touched since, so that nothing is read."""
    file = folder / f"{split}.jsonl"
    report = read_report(folder)
    recorded = report["files"].get(file.name) if report else None
    return recorded["sha256"] if recorded and _looks_untouched(file, recorded) else _sha256(file)


def load_rows(recipe: Recipe, split: str, tokenizer, cache: Path, workers: int = 1) -> TokenisedRows:
    """The training rows of `split`, `train` or `test`, for a process that is alone; see the two steps."""
    return map_rows(recipe, split, folder_with_tokens(recipe, split, tokenizer, cache, workers))


def folder_with_tokens(recipe: Recipe, split: str, tokenizer, cache: Path, workers: int = 1) -> Path:
    """Where the tokens of `split` are: beside its lines, as `prepare` wrote them, and nothing more than that is read.

    Where `prepare` wrote none, or SPLIT.jsonl was changed since, they are made, once, in a folder in `cache`.
    """
    folder = _lines(recipe, split).parent
    if has_tokens(folder, split, read_report(folder)):
        return folder
    return tokenised_in(cache, recipe, split, tokenizer, workers)


def map_rows(recipe: Recipe, split: str, folder: Path) -> TokenisedRows:
    """The training rows of `split`, memory-mapped from `folder`.

    Raises UsageError where there are none, or where every answer begins beyond `max_length`.
    """
    tokens = TokenFile(folder / f"{split}.tokens.arrow")
    refuse_no_rows(recipe, split, len(tokens))
    rows = TokenisedRows(tokens, _layout(folder, split, tokens, recipe), recipe.packing)
    if not any(label != IGNORED for row in rows for label in row["labels"][1:]):  # the first token follows none
        raise UsageError(
            f"{_lines(recipe, split)}: no row has an answer within max_length {recipe.max_length:,}; set a larger one"
        )
    return rows


def refuse_no_rows(recipe: Recipe, split: str, rows: int | None = None) -> None:
    """UsageError where SPLIT.jsonl is missing or empty, or where `rows`, how many it has, is 0."""
    file = _lines(recipe, split)
    if rows == 0 or not file.stat().st_size:
        held_out = "; prepare held-out rows (data.test_split or data.test_fraction)" if split == "test" else ""
        raise UsageError(f"{file}: no rows{held_out}")


def rows_beyond(max_length: int, rows: TokenisedRows) -> int:
    """How many rows lose what they have beyond `max_length` tokens. Looks at every row's length."""
    return int(((rows.tokens.lengths() > max_length) & ~rows.tokens.is_text()).sum())


def first_rows(recipe: Recipe, split: str, count: int) -> list[dict]:
    """The first `count` rows of SPLIT.jsonl."""
    if not count:
        return []
    with _lines(recipe, split).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def has_tokens(folder: Path, split: str, report: dict | None) -> bool:
    """Whether the tokens beside SPLIT.jsonl are there, whole, and of the rows that it holds now."""
    names = [f"{split}.jsonl", f"{split}.tokens.arrow", f"{split}.packed.arrow"]
    recorded = [report["files"].get(name) if report else None for name in names]
    return all(recorded) and all(_is_untouched(folder / name, file) for name, file in zip(names, recorded, strict=True))


def tokenised_in(cache: Path, recipe: Recipe, split: str, tokenizer, workers: int) -> Path:
    """The folder with the tokens of a SPLIT.jsonl that has none, made if they are not there yet."""
    source = _lines(recipe, split)
    how = [recipe.data.train_on, recipe.data.reasoning]
    made_from = [_sha256(source), tokenizer_hash(tokenizer), template_hash(tokenizer), *how]
    folder = cache / f"{split}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, replace=True) as unfinished:
            tokenise_lines(source, unfinished / f"{split}.tokens.arrow", tokenizer, recipe.data, workers)
    return folder


def _lines(recipe: Recipe, split: str) -> Path:
    file = Path(recipe.data.prepared) / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file}: no such file; run `{command()} prepare RECIPE` first, or set data.prepared")
    return file


def _layout(folder: Path, split: str, tokens: TokenFile, recipe: Recipe) -> Layout:
    """As `prepare` wrote it; made anew, from the lengths alone, where it was for rows of another length."""
    report = read_report(folder)
    if report and (report["max_length"], report["packing"]) == (recipe.max_length, recipe.packing):
        return Layout(folder / f"{split}.packed.arrow")
    return Layout(lay_out(tokens.lengths(), tokens.is_text(), recipe.max_length, recipe.packing))


def _looks_untouched(file: Path, recorded: dict) -> bool:
    """By size and time: the report is written last."""
    stat = file.stat()
    return stat.st_size == recorded["bytes"] and stat.st_mtime_ns <= (file.parent / REPORT).stat().st_mtime_ns


def _is_untouched(file: Path, recorded: dict) -> bool:
    """Where the time says nothing, as after a copy, by its contents."""
    if not file.is_file() or file.stat().st_size != recorded["bytes"]:
        return False
    return _looks_untouched(file, recorded) or _sha256(file) == recorded["sha256"]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(value) -> str:
    if value is None:
        return "none"
    return quote(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
