"""report.html of tiny run folders, read with the standard library's parser."""

import json
import re
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_folders import EVIL, STEPS, finished_run, metrics, unfinished_run, write_json

from fitune.cli import cli
from fitune.planning.fill import resolve
from fitune.planning.sizes import GIB
from fitune.report.charts import running_means, thinned
from fitune.report.differences import marked
from fitune.report.figures import memory_table
from fitune.report.page import MOST_BYTES, write_page, write_page_again
from fitune.report.run_files import RunFiles

WITHOUT_END = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each; end tags must match."""

    def __init__(self, file: Path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.html = file.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append((tuple(self.open), text))

    def text(self, tag: str | None = None) -> str:
        """Of all elements of a tag, or of the page, spaces made one."""
        return " ".join(" ".join(text for opened, text in self.texts if tag is None or tag in opened).split())

    def charts(self) -> list[str]:
        return [attributes["aria-label"] for tag, attributes in self.elements if tag == "svg"]


def call(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["report", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_folder_in_a_files_place_is_one_line(tmp_path):
    run = finished_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert call(run) == (1, f"error: {run}/metrics.jsonl: Is a directory\n")


def test_a_finished_run_shows_all_its_parts(tmp_path):
    page = Page(write_page(finished_run(tmp_path / "first"), price_per_hour=4.0))
    charts, text = page.charts(), page.text()
    for name in (
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Host RAM by phase",
        "Tokens of the",
    ):
        assert sum(chart.startswith(name) for chart in charts) == 1, name
    loss = charts[0]
    assert f"training: {metrics()[-2]['loss']:.4g} at step {STEPS}" in loss and "held out: " in loss
    for shown in (
        "finished after 40 steps", "eval: loss, base to tuned 2.5000 → 1.2500", "1.00 h", "4.00", "931",
        "host: peak", "2.50", "answer is empty", "training rows 90", "torch 2.13.0", "d" * 64, "recipe.lora.r",
        "system", "Be brief.", "3 of 3", "host RAM, GiB 15.6",
    ):  # fmt: skip
        assert shown in text, shown
    assert text.count("the red house") == 3
    assert page.text("del").endswith("red red red") and page.text("ins").endswith("blue blue blue")


@pytest.mark.parametrize("copies", [1, 2])
def test_what_torch_reserves_is_planned_without_what_lies_outside(copies):
    """CUDA's context, and what NCCL takes where each GPU has a whole copy."""
    sets = ("profile.micro_batch=1", "profile.kept_layers=0", f"profile.replicas={copies}")
    files = RunFiles(resolve("llama3_8b_qlora", "fsdp_2x40gb", sets), "run", [], {}, {}, {}, {}, {}, {})
    planned, plan = {name: planned for name, (planned, _) in memory_table(files)}, files.plan
    inside = plan.gpu.allocated + plan.gpu.components["allocator slack"]
    assert planned["one GPU: reserved by torch, peak"] == f"{inside / GIB:.2f}"
    assert planned["one GPU: all, with CUDA's context and kernels"] == f"{plan.gpu.total / GIB:.2f}"


def test_a_result_of_an_earlier_step_is_named(tmp_path):
    run = finished_run(tmp_path / "first")
    assert "the best evaluation" not in Page(write_page(run)).text()
    write_json(run / "finished.json", {"step": STEPS, "epoch": 2.0, "result_step": 10, "stopped_early": True})
    said = "finished after 40 steps, stopped early; result: step 10, the best evaluation"
    assert said in Page(write_page(run)).text()


def test_gpu_memory_is_shown_beside_the_plan(tmp_path):
    memory = {"gpu_memory_gib": 6.5, "gpu_memory_planned_gib": 7.0}
    page = Page(write_page(unfinished_run(tmp_path / "run", [line | memory for line in metrics(20)])))
    [chart] = [chart for chart in page.charts() if chart.startswith("GPU memory")]
    assert "measured: 6.5 at step 20" in chart and "planned: 7 at step 20" in chart


@pytest.mark.parametrize(("method", "said"), [("lora", True), ("qlora", False)])
def test_a_base_kept_in_fp8_is_named_beside_the_losses(method, said, tmp_path):
    sets = (f"method={method}", "profile.compute=fp8")
    page = Page(write_page(unfinished_run(tmp_path / "run", sets=sets)))
    assert ("Training kept the base rounded to fp8" in page.text()) == said


def test_texts_are_shown_not_run(tmp_path):
    page = Page(write_page(finished_run(tmp_path / "first")))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    words = " ".join(EVIL.split())
    answers = page.text("article")
    assert answers.count(words) == 3 * 4, "prompt, both answers and the one in the data"
    assert words in page.text("dl") and words in page.text("th"), "source and reason"


def test_the_page_needs_no_network(tmp_path):
    page = Page(write_page(finished_run(tmp_path / "first")))
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", page.html)
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page.elements)


def test_ids_are_unique_and_every_reference_is_there(tmp_path):
    page = Page(write_page(finished_run(tmp_path / "first")))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', page.html)) <= set(ids)


def test_long_runs_and_long_answers_stay_under_the_limit(tmp_path):
    lines = [{**line, "step": step} for step in range(1, 60_001) for line in metrics(1)]
    lines[30_000]["loss"] = 99.0
    run = finished_run(tmp_path / "first", lines)
    long = {"messages": [{"role": "user", "content": "<" * 50_000}], "base": "& " * 30_000, "tuned": "é < " * 30_000}
    write_json(run / "answers.json", {"rows": [long] * 200})
    file = write_page(run)
    assert file.stat().st_size < MOST_BYTES
    page = Page(file)
    shown, of = re.search(r"(\d+) of (\d+), the others in answers.json", page.text()).groups()
    assert 5 < int(shown) < int(of) == 200
    assert "46,000 more characters" in page.text()


def test_a_spike_is_not_thinned_away():
    points = [(step, 1.0) for step in range(10_000)]
    points[5_003] = (5_003, 50.0)
    points[7_001] = (7_001, -3.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100 and kept == sorted(kept)
    assert {(5_003, 50.0), (7_001, -3.0)} <= set(kept)


def test_running_means():
    points = [(step, float(step % 2)) for step in range(6)]
    assert running_means(points, 2) == [(0, 0.0), *((step, 0.5) for step in range(1, 6))]
    assert running_means(points[:2], 40) == [(0, 0.0), (1, 0.5)]


@pytest.mark.parametrize("lines", [[], metrics(20), metrics(1)], ids=["nothing logged", "half way", "one step"])
def test_an_unfinished_run_has_a_page(tmp_path, lines):
    page = Page(write_page(unfinished_run(tmp_path / "half", lines)))
    last = lines[-1]["step"] if lines else 0
    assert (f"unfinished: step {last} of {STEPS}" if lines else "nothing logged yet") in page.text()
    assert "None yet. This asks the first ten: " in page.text() and "has no report.json" in page.text()
    assert len(page.charts()) == (5 if lines else 1)


def test_damaged_files_are_named_and_cost_only_their_part(tmp_path):
    run = finished_run(tmp_path / "first")
    (run / "measurements.json").write_text('{"tokens_per')
    (run / "eval.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "loss": NaN}\n{"step": 42, "lo')
    text = Page(write_page(run)).text()
    assert "measurements.json cannot be read" in text and "eval.json cannot be read" in text
    assert "finished after 40 steps" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("measurements.json", {"ranks": 3}, "measurements.json: ranks is damaged"),
        ("measurements.json", {"ranks": None}, ""),
        ("origin.json", {"hardware": 7, "versions": [], "starts": {"a": 1}}, "origin.json: hardware is damaged"),
        ("answers.json", {"rows": ["x"]}, "answers.json: rows is damaged"),
        ("answers.json", {"rows": [{"messages": "hi"}]}, "answers.json: rows is damaged"),
        ("data.json", {"report": "x"}, "data.json: report is damaged"),
        ("data.json", {"report": {"tokens": 3}}, "report.json: tokens is damaged"),
        ("finished.json", {"step": "x"}, "finished.json: step is damaged"),
    ],
)
def test_json_of_another_shape_costs_only_its_part(tmp_path, name, content, said):
    run = finished_run(tmp_path / "first")
    (run / name).write_text(json.dumps(content))
    assert said in Page(write_page(run)).text()


@pytest.mark.parametrize("names", [("r$_$1", "plain"), ("_a", "_b"), ("lr$1$x", "b")])
def test_a_curve_is_told_by_its_runs_name_whatever_signs_it_has(tmp_path, names):
    first, second = (finished_run(tmp_path / name) for name in names)
    html = write_page(first, (second,)).read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf">\s*{re.escape(name)}, training\s*</text>", html), "in the legend"


def test_runs_beside_each_other(tmp_path):
    first = finished_run(tmp_path / "first")
    second = finished_run(tmp_path / "second", metrics(loss=5.0), ("training.learning_rate=1e-4",))
    third = unfinished_run(tmp_path / "third")
    code, output = call(first, "--compare", second, third)
    assert (code, output) == (0, f"page: {first / 'report.html'}\n")
    page = Page(first / "report.html")
    loss = page.charts()[0]
    for name in ("first", "second", "third"):
        assert f"{name}, training: " in loss and f"{name}, held out: " in loss
    table = page.text("table")
    assert "recipe.training.learning_rate 0.002 0.0001 0.002" in table
    assert "unfinished: step 20 of 40" in table and "recipe.seed" not in table
    assert not (second / "report.html").exists()


def test_the_page_is_written_again_as_it_was_asked_for(tmp_path):
    first, second = finished_run(tmp_path / "first"), finished_run(tmp_path / "second")
    write_page(first, (second,), 3.5)
    before = (first / "report.html").read_bytes()
    (first / "report.html").unlink()
    write_page_again(first)
    assert (first / "report.html").read_bytes() == before
    (second / "run.yaml").unlink()
    write_page_again(first)
    assert "Runs beside each other" not in (first / "report.html").read_text()


def test_the_command_that_repeats_a_run(tmp_path):
    run = finished_run(tmp_path / "a run")
    [repeat, *_] = [text for opened, text in Page(write_page(run)).texts if "pre" in opened and text.strip()]
    assert shlex.split(repeat) == ["fitune", "train", "tiny_qlora", "--output", f"{run}-again"]
    (run / "origin.json").unlink()
    [repeat, *_] = [text for opened, text in Page(write_page(run)).texts if "pre" in opened and text.strip()]
    assert "accelerate launch --config_file" in repeat and shlex.quote(f"{run}-again/run.yaml") in repeat


def test_data_that_were_prepared_again_are_named(tmp_path):
    run, report = finished_run(tmp_path / "first"), tmp_path / "data" / "report.json"
    assert "prepared again" not in Page(write_page(run)).text()
    write_json(report, json.loads(report.read_text()) | {"files": {"train.jsonl": {"sha256": "f" * 64}}})
    said = "prepared again since this run was started: these are"
    assert f"{said} the new ones. source" in Page(write_page(run)).text()


def test_the_data_of_a_run_are_those_that_it_was_started_with(tmp_path):
    run, report = finished_run(tmp_path / "first"), tmp_path / "data" / "report.json"
    then = json.loads(report.read_text())
    write_json(run / "data.json", {"rows": {"train": "d" * 64}, "report": then})
    assert "prepared again" not in Page(write_page(run)).text()
    write_json(report, then | {"train_rows": 7777, "files": {"train.jsonl": {"sha256": "f" * 64}}})
    text = Page(write_page(run)).text()
    assert "prepared again since this run was started: these are those that it was trained on. source" in text
    assert "training rows 90" in text and "7,777" not in text
    report.unlink()
    assert "training rows 90" in Page(write_page(run)).text()


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    run = unfinished_run(tmp_path / "run")
    for arguments in ([tmp_path], [tmp_path / "nowhere"], [run, "--compare", tmp_path]):
        code, output = call(*arguments)
        assert code == 2 and output.count("\n") == 1
        assert "no such file; expected a run folder written by" in output
    code, output = call(run, tmp_path)
    assert code == 2 and "put --compare before it" in output


def test_half_a_character_in_an_answer_is_replaced(tmp_path):
    run = finished_run(tmp_path / "first")
    (run / "answers.json").write_text('{"rows": [{"messages": [], "base": "half \\ud83d here", "tuned": "x"}]}')
    assert "half ? here" in Page(write_page(run)).text()


def test_an_answer_without_a_word_says_so(tmp_path):
    run = finished_run(tmp_path / "first")
    (run / "answers.json").write_text('{"rows": [{"messages": [], "base": "here", "tuned": ""}]}')
    text = Page(write_page(run)).text()
    assert text.count("nothing: it ended at once") == 1 and "full, lora, qlora" in text


def test_answers_that_repeat_themselves_are_compared_in_seconds():
    began = time.process_time()
    base, tuned = marked("a " * 2000, "a b " * 1000)
    assert time.process_time() - began < 20, "minutes, where every pair of words is looked at again and again"
    assert base.striptags() == ("a " * 2000).strip() and "b" in tuned


def test_words_that_differ_are_marked():
    base, tuned = marked("one two <b>\n four", "one 2 <b>\n four five")
    assert base == "one <del>two</del> &lt;b&gt;\n four"
    assert tuned == "one <ins>2</ins> &lt;b&gt;\n four <ins>five</ins>"
    assert marked("", "x") == ("", "<ins>x</ins>")
