"""The report of real runs: what it says, and how a browser shows it."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from command_line import invoke
from negative_cache.workbench.report.runs import Run
from negative_cache.workbench.report.svg import MAX_POINTS, MAX_RUNS, Line, _thinned, draw, short
from negative_cache.workbench.training.samples import NUM_CHANGED

HOSTILE = "<script>document.title = 'taken'</script> & </pre><img src=http://127.0.0.1:9/x.png>"
NUM = 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `nc` and `ib`, on data with documents that contain a script."""
    place = tmp_path_factory.mktemp("report")
    data = place / "data"
    (data / "qrels").mkdir(parents=True)
    words = [f"{a}{b}" for a in ("river", "engine", "violin", "castle", "planet") for b in range(12)]
    texts = {f"d{n}": f"{word} {HOSTILE} " + "long_word" * 30 for n, word in enumerate(words)}
    (data / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": k, "text": t}) for k, t in texts.items()))
    queries = [{"_id": f"q{n}", "text": f"<b>{word}</b>"} for n, word in enumerate(words)]
    (data / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    for split, part in {"train": range(40), "dev": range(40, 48), "test": range(48, NUM)}.items():
        (data / "qrels" / f"{split}.tsv").write_text("\n".join(f"q{n}\td{n}\t1" for n in part))
    for loss, options in (
        ("negative-cache", ["--cache-size", "32", "--eval-steps", "10", "--num-samples", "1"]),
        ("in-batch", []),
    ):
        output = place / ("nc" if options else "ib")
        given = ["--data", str(data), "--output", str(output), "--loss", loss, *options, "--batch-size", "8"]
        ended = invoke("train", *given, "--epochs", "6", "--learning-rate", "0.05")
        assert ended.exit_code == 0, ended.output
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    ended = report(folder / "nc", folder / "ib", "--output", folder / "both.html")
    assert ended.exit_code == 0, ended.output
    return folder / "both.html"


def report(*args: object):
    return invoke("report", *args)


class Reader(HTMLParser):
    """Tags, addresses and words of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data + " "


def test_the_page_shows_the_records_and_samples(page: Path, folder: Path):
    read = Reader(page)
    words = " ".join(read.words.split())
    headings = ("Result", "Training", "Cache", "Before and after", "Hard negatives", "Configuration")
    charts = ("Loss", "MRR@10 on the dev split", "Learning rate", "Seconds", "Peak memory, GB", "Fill", "Staleness")
    for text in (
        *headings,
        *charts,
        "Effective negatives",
        "Staleness against age",
        "positive of the query, never drawn",
    ):
        assert text in words
    for run in ("nc", "ib"):
        record = json.loads((folder / run / "run.json").read_text())
        for when in ("before", "after"):
            assert all(f"{record[when][name]:.4f}" in words for name in ("MRR@10", "R@100"))
    differing = [attrs for tag, attrs in read.tags if tag == "tr" and attrs.get("class") == "differs"]
    assert len(differing) >= 2  # the loss and --eval-steps, at least
    assert "≠ loss negative-cache in-batch" in words
    assert "Before training: random weights (--model static)." in words
    found = json.loads((folder / "nc" / "samples.json").read_text())
    for entry in found["after"]:
        assert entry["text"] in words
    assert read.tags[0] == ("html", {"lang": "en"})
    figures = [attrs for tag, attrs in read.tags if tag == "figure"]
    assert len(figures) >= 14
    assert all(re.search(r"A, nc: from \S+ at|B, ib: from \S+ at", attrs["aria-label"]) for attrs in figures)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)


def test_the_page_shows_differences_with_intervals(page: Path, folder: Path):
    words = " ".join(Reader(page).words.split())
    means = {}
    for run in ("nc", "ib"):
        found = json.loads((folder / run / "queries.json").read_text())
        for when in ("before", "after"):
            means[run, when] = sum(found[when]["MRR@10"].values()) / len(found[when]["MRR@10"])
    rows = {
        "after \N{MINUS SIGN} before": means["nc", "after"] - means["nc", "before"],
        "A \N{MINUS SIGN} B": means["nc", "after"] - means["ib", "after"],
    }
    for label, difference in rows.items():
        assert re.search(rf"{label} {re.escape(f'{difference:+.4f}')} [+-]\d\.\d{{4}} to [+-]\d\.\d{{4}} ", words)
    assert "B \N{MINUS SIGN} A" not in words
    assert "best" not in {attrs.get("class") for _, attrs in Reader(page).tags}
    for run in ("nc", "ib"):
        assert f"{folder / run / 'queries.json'}" in words


def test_the_page_shows_what_a_run_knows_of_the_queries_of_another_one(page: Path, folder: Path, tmp_path: Path):
    """Here the in-batch run does not show a query of the other one."""
    shutil.copytree(folder / "ib", tmp_path / "ib")
    samples = json.loads((tmp_path / "ib" / "samples.json").read_text())
    left_out = samples["after"].pop(0)["query"]
    samples["changes"] = {"better": 1234, "worse": 5, "equal": 0}
    (tmp_path / "ib" / "samples.json").write_text(json.dumps(samples))
    values = json.loads((tmp_path / "ib" / "queries.json").read_text())
    ended = report(folder / "nc", tmp_path / "ib", "--output", tmp_path / "page.html")
    assert ended.exit_code == 0, ended.output
    words = " ".join(Reader(tmp_path / "page.html").words.split())
    reciprocal = values["after"]["MRR@10"][left_out]
    assert f"B ib rank {round(1 / reciprocal) if reciprocal else '> 10'} after training" in words
    assert "B ib: training improved the rank of the best relevant document for 1,234 queries" in words


def test_methods_explain_each_measure(page: Path, folder: Path):
    methods = page.read_text(encoding="utf-8").partition('id="about"')[2]
    explained = set(re.findall(r"<dt>([^<]*)</dt><dd>[^<]+</dd>", methods))
    measures = set(json.loads((folder / "nc" / "run.json").read_text())["after"]) - {"num_queries", "num_documents"}
    assert {re.sub(r"^R@\d+$", "R@k", name) for name in measures} <= explained


def test_the_page_says_what_was_searched(page: Path, folder: Path, tmp_path: Path):
    whole = f"the whole corpus of {NUM} documents"
    words = " ".join(Reader(page).words.split())
    assert words.count(f"Searched: {whole}.") == 2  # above the examples, and in Methods
    shutil.copytree(folder / "ib", tmp_path / "ib")
    record = json.loads((tmp_path / "ib" / "run.json").read_text())
    for number, limit, searched in ((25, 25, "a sample of 25 documents (--eval-documents)"), (NUM, NUM + 1, whole)):
        record["after"]["num_documents"] = record["before"]["num_documents"] = number
        record["configuration"]["data_options"]["eval_documents"] = limit
        (tmp_path / "ib" / "run.json").write_text(json.dumps(record))
        assert report(tmp_path / "ib").exit_code == 0
        words = " ".join(Reader(tmp_path / "ib" / "report.html").words.split())
        assert words.count(f"Searched: {searched}.") == 2
        assert f"eval_documents {limit} " in words
        assert "data_options" not in words
        assert ("whole corpus" in words) == (searched == whole)
        assert report(folder / "nc", tmp_path / "ib", "--output", tmp_path / "page.html").exit_code == 0
        both = whole if searched == whole else f"A: {whole}; B: {searched}"
        assert f"Searched: {both}." in " ".join(Reader(tmp_path / "page.html").words.split())


def test_likely_false_negatives_give_advice(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "nc", tmp_path / "nc")
    samples = json.loads((tmp_path / "nc" / "samples.json").read_text())
    for number, entry in enumerate(samples["negatives"]):
        for row in entry["negatives"]:
            row["similarity"] = entry["positive"]["similarity"] + (0.01 if number < 3 else -0.01)
    for is_likely in (True, False):
        (tmp_path / "nc" / "samples.json").write_text(json.dumps(samples))
        assert report(tmp_path / "nc").exit_code == 0
        words = " ".join(Reader(tmp_path / "nc" / "report.html").words.split())
        assert ("for 3 of 10 queries, a document is more similar to the query than the positive" in words) == is_likely
        assert ("hide them with --relative-margin 0.05" in words) == is_likely
        for entry in samples["negatives"]:
            entry["negatives"] = []


def test_the_page_needs_no_other_file_and_texts_are_escaped(page: Path):
    read = Reader(page)
    assert not {"script", "img", "iframe"} & {tag for tag, _ in read.tags}
    assert html.escape("<b>planet0</b>", quote=False) in page.read_text()
    assert HOSTILE[:30] in read.words  # as text
    for tag, attrs in read.tags:
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:,")), (tag, attrs)
    assert "url(http" not in page.read_text().replace(html.escape(HOSTILE), "")


def test_the_page_of_one_run_is_in_its_folder(folder: Path):
    ended = report(folder / "ib")
    assert ended.exit_code == 0, ended.output
    words = Reader(folder / "ib" / "report.html").words
    assert "Report of a run: ib" in words
    assert "Hard negatives" not in words  # there is no cache


def test_nan_and_missing_samples_give_a_page(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "nc", tmp_path / "nan")
    record = json.loads((tmp_path / "nan" / "run.json").read_text())
    for row in record["history"][2:]:
        if "loss" in row:
            row["loss"] = float("nan")
    (tmp_path / "nan" / "run.json").write_text(json.dumps(record))
    (tmp_path / "nan" / "samples.json").unlink()
    assert report(tmp_path / "nan").exit_code == 0
    assert "Before and after" not in Reader(tmp_path / "nan" / "report.html").words


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "is not a directory"),
        (["data"], "has neither run.json nor compare.json"),
        (["nc", "nc"], "is given twice"),
        (["nc", "ib"], "2 folders have no common place for their page. Give --output"),
        (["nc", "--output", "data"], "cannot be written"),
        (["nc", "--output", "nowhere/x.html"], "cannot be written"),
        (["damaged"], "is damaged"),
        (["other"], "is not the record of a run"),
        (["list"], "expected an object, got list"),
    ],
)
def test_other_folders_are_refused(args: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    for name, content in (("damaged", "{"), ("other", '{"a": 1}'), ("list", "[]")):
        Path(name).mkdir(exist_ok=True)
        Path(name, "run.json").write_text(content)
    ended = report(*args)
    assert ended.exit_code == 2
    assert message in " ".join(ended.stderr.split())


def test_samples_have_ranks_before_and_after_training(folder: Path):
    found = json.loads((folder / "nc" / "samples.json").read_text())
    num_shown = sum(min(found["changes"][way], NUM_CHANGED) for way in ("better", "worse"))
    assert len(found["before"]) == len(found["after"]) == num_shown > 0
    for entry in found["before"] + found["after"]:
        scores = [hit["score"] for hit in entry["found"]]
        assert scores == sorted(scores, reverse=True)
        places = [place for place, hit in enumerate(entry["found"], start=1) if hit["is_relevant"]]
        assert [entry["rank"]] == places[:1] or (not places and entry["rank"] > 5)
    record = json.loads((folder / "nc" / "run.json").read_text())
    times = [row["seconds"] for row in record["history"] if "loss" in row]
    assert times == sorted(times)
    assert 0 < times[-1] <= record["seconds"]


def test_no_two_runs_look_alike():
    runs = [Run("run", None, number=number) for number in range(MAX_RUNS)]
    assert len({(run.colour, run.dashes) for run in runs}) == MAX_RUNS
    assert len({run.letter for run in runs}) == MAX_RUNS


def test_long_curves_are_thinned_and_keep_their_end():
    long = _thinned(Line(0, list(range(10_001)), list(range(10_001))))
    assert 100 < len(long.x) <= MAX_POINTS
    assert long.x[-1] == long.y[-1] == 10_000
    assert len(draw([long], "name")) < 40_000


@pytest.mark.parametrize("values", [(0.31, 0.48), (0.17, 0.36), (2.1, 4.9), (1e-3, 1e3), (5.0, 5.0), (101.0, 104.0)])
def test_a_logarithmic_axis_has_several_ticks(values: tuple[float, float]):
    svg = draw([Line(0, [0, 1], list(values))], "name", is_log=True)
    labels = re.findall(r">([^<]*)</text>", svg.partition(">step</text>")[2])
    assert len(set(labels)) >= 3, labels


@pytest.mark.parametrize("values", [(0.679, 0.6791), (0.3, 0.3), (-1.0, -1.001), (0.0, 0.0)])
def test_the_labels_of_a_linear_axis_differ(values: tuple[float, float]):
    svg = draw([Line(0, [0, 1], list(values))], "name")
    labels = re.findall(r">([^<]*)</text>", svg.partition(">step</text>")[2])
    assert len(set(labels)) == len(labels) >= 3, labels


def test_short_numbers():
    assert [short(value) for value in (0, 0.12345, 1e-5, 12.0, 1234.0, 2.5e6, 3e9, float("nan"))] == [
        "0", "0.123", "1.0e-05", "12", "1.234k", "2.5M", "3G", "nan",
    ]  # fmt: skip


PROBE = """<script>
const broken = [], errors = [];
document.addEventListener("securitypolicyviolation", event => broken.push(event.blockedURI));
window.addEventListener("error", event => errors.push(String(event.message || event.target)), true);
window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("main *, header *, footer *")].filter(element =>
    element.getBoundingClientRect().right > root.clientWidth + 1 && !element.closest(".scroll, pre, svg"));
  const found = {
    width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map(element => element.outerHTML.slice(0, 200)),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name), broken, errors,
    title: document.title, page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    lines: [...document.querySelectorAll(".card > svg g path")].map(path => getComputedStyle(path))
      .filter(style => style.strokeOpacity !== "0").map(style => style.stroke),
    small: Math.min(...[...document.querySelectorAll(".card > svg text")].map(text =>
      parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.clientWidth
      / text.ownerSVGElement.viewBox.baseVal.width)),
  };
  parent.postMessage(JSON.stringify(found), "*");
}, 50));
</script>"""


# A browser without a screen has no window as narrow as a phone.
PHONE = """<!doctype html><iframe src="copy.html" style="width: 360px; height: 900px; border: 0"></iframe><script>
window.addEventListener("message", event => { document.body.textContent = "FOU" + "ND" + event.data + "DO" + "NE"; });
</script>"""


def look(page: Path, folder: Path, *options: str, more: str = "") -> dict:
    """What a browser finds of a page that it shows 360 pixels wide."""
    text = page.read_text(encoding="utf-8")
    policy = "default-src 'none';"
    assert policy in text
    text = text.replace(policy, f"{policy} script-src 'unsafe-inline';").replace("<title>", PROBE + "<title>")
    (folder / "copy.html").write_text(text.replace("<main>", f"<main>{more}"), encoding="utf-8")
    (folder / "phone.html").write_text(PHONE, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--hide-scrollbars", "--virtual-time-budget=2000", "--enable-logging=stderr", "--v=0", *options]
    ended = subprocess.run(
        [*command, "--dump-dom", f"file://{folder}/phone.html"], capture_output=True, text=True, timeout=100
    )
    found = re.search("FOUND(.*)DONE", ended.stdout, re.DOTALL)
    assert found, ended.stderr
    return {**json.loads(html.unescape(found[1])), "console": "CONSOLE" in ended.stderr}


@needs_browser
def test_the_page_fits_on_a_phone_and_fetches_nothing(page: Path, tmp_path: Path):
    found = look(page, tmp_path)
    assert found["width"] == 360
    assert found["scroll"] <= 360, found["wide"]
    assert found["wide"] == []
    assert (found["fetched"], found["broken"], found["errors"], found["console"]) == ([], [], [], False)
    assert found["title"] == "Report: nc, ib"
    assert found["small"] >= 8
    light, dark = found, look(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert _brightness(light["page"]) > 0.9 > 0.2 > _brightness(light["ink"])
    assert _brightness(dark["page"]) < 0.2 < 0.8 < _brightness(dark["ink"])
    for shown in (light, dark):
        ratios = {line: _contrast(line, shown["page"]) for line in shown["lines"] if line.startswith("rgb(")}
        assert len(ratios) >= 4  # axes, grid, two runs
        assert sum(ratio >= 3 for ratio in ratios.values()) >= len(ratios) - 1  # all but the grid


@needs_browser
def test_the_browser_check_detects_a_wide_page_and_a_request(page: Path, tmp_path: Path):
    """A page that is too wide and asks for a picture."""
    found = look(page, tmp_path, more='<img src="http://127.0.0.1:9/x.png"><p style="width: 999px">wide</p>')
    assert found["scroll"] > 360
    assert found["wide"]
    assert found["broken"] == ["http://127.0.0.1:9/x.png"]
    assert found["console"]


@needs_browser
def test_printing_keeps_folded_parts_folded(page: Path, tmp_path: Path):
    target = tmp_path / "page.pdf"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={target}"]
    subprocess.run([*command, f"file://{page}"], check=True, capture_output=True, timeout=100)
    pages = len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))
    assert 3 <= pages <= 20  # far more if all were unfolded


def _channels(colour: str) -> list[float]:
    return [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]


def _brightness(colour: str) -> float:
    return sum(_channels(colour)) / 3


def _contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
