"""The page: it stands alone, claims no more than the numbers carry, and takes scores apart correctly."""

import base64
import dataclasses
import io
import json
import re
import shlex
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from results import COUNT, make_result, small_world

from stepdistill import diagnose
from stepdistill.cli import run as command
from stepdistill.diffusion.times import trailing
from stepdistill.eval import breakdown, charts, curves, metrics, page, provenance, report, tables
from stepdistill.eval.metrics import Estimate
from stepdistill.eval.models import open_model
from stepdistill.worlds import stored_results

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "wbr", "link", "input"}


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, whether every one is closed in its turn, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.text, self.styles = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.text).append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def trained_in(folder: Path) -> Path:
    """A run folder with the quickstart's recipe and log."""
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text((ROOT / "configs/fashion/quickstart.yaml").read_text())
    (run / "log.jsonl").write_text((ROOT / "docs/fashion/log.jsonl").read_text())
    return run


def four_in(folder: Path) -> list[Path]:
    """Two teachers and two students, one of them with a name that a page must not take for markup."""
    alone, two = {"threads": 1, "torch": "2.0"}, {"threads": 2, "torch": "2.0"}
    return [make_result(folder, "t50", "teacher:fashion", 50, 0.15, is_teacher=True, guidance=1.5, env=alone),
            make_result(folder, "t2", "teacher:fashion", 2, 0.3, is_teacher=True, env=alone),
            make_result(folder, "s1", "mine <b>&", 1, 0.4, env=two), make_result(folder, "s4", "student", 4, 0.02, env=alone)]


@dataclass(frozen=True)
class Written:
    """A report of four results and a run, read once for all tests that only look at it."""

    results: list[Path]
    run: Path
    value: dict
    text: str
    page: Reader
    markdown: str


def write(results: list[Path], to: Path, *runs: Path) -> Written:
    value = report.compare(results, to, runs)
    text = (to / "report.html").read_text(encoding="utf-8")
    return Written(results, runs[0] if runs else to, value, text, Reader(text), (to / "report.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Written:
    folder = tmp_path_factory.mktemp("four")
    with pytest.MonkeyPatch.context() as patch:
        small_world(patch)
        return write(four_in(folder), folder / "out", trained_in(folder))


# ---- the file


def test_the_page_stands_alone(four):
    """Nothing is fetched or run; ids are unique and every reference within the page is met; markup is closed, names are escaped."""
    page = four.page
    assert page.open == []
    assert page.all("script", "link", "iframe", "object", "b") == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "href", "xlink:href", "srcset", "data"} & set(attributes):
            assert attributes[name].startswith(("#", "data:image/png;base64,")), attributes[name]
    assert not re.search(r"@import|url\((?!#)", "".join(page.styles))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    aims = {value[1:] for _, a in page.elements for name, value in a.items() if name in ("href", "xlink:href") and value.startswith("#")}
    aims |= set(re.findall(r"url\(#([^)]+)\)", " ".join(value for _, a in page.elements for value in a.values() if value)))
    assert aims <= set(ids)
    assert "mine <b>&, 1 step" in page.words


def test_the_page_is_accessible(four):
    page = four.page
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.all("svg"))
    assert all(head["scope"] in ("row", "col") for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    words = page.words
    for mark in ("▲ better", "▼ worse", "falls, then a plateau above 0", "✓ healthy", "Pareto front", "≠ threads", "unequal threads"):
        assert mark in words, mark
    assert "≠ torch" not in words
    drawn = len(page.all("svg"))
    assert drawn == 2 + 2 + 11                                                  # costs, classes, curves in the quickstart's log
    assert len(page.all("img")) == 10 * 4                                       # classes and models


def test_figures_take_the_colours_of_the_page(four):
    figures = re.findall(r"<svg .*?</svg>", four.text, re.DOTALL)
    assert len(figures) == len(four.page.all("svg"))
    for figure in figures:
        assert not re.search(r"(fill|stroke): #|<metadata|<!--", figure)
        assert set(re.findall(r"var\((--[\w-]+)\)", figure)) <= set(charts.PROPERTIES.values())
    for colour, name in charts.PROPERTIES.items():
        light, dark, *_ = re.findall(rf"{name}: (#\w+);", four.text)
        assert light == colour
        assert dark != colour


def test_no_text_leaves_its_figure(four):
    rows, names = four.value["rows"], four.value["classes"]["names"]
    dots = [charts.Dots(row["label"], row["series"], row["is_teacher"], row["classes"]["distance"]["value"], [0.1] * 10) for row in rows]
    figures = [charts.plot_quality(charts.points(rows, cost), axis, "frechet_fashion, lower is better", charts.COST)
               for cost, axis in (("nfe", charts.NFE), ("ms_per_image", charts.MS))]
    long = [charts.Point(f"{'long' * 12}{i}", f"{'long' * 12}{i}", False, i + 1, i + 1, i + 0.9, i + 1.1) for i in range(8)]
    figures += [charts.plot_quality(many, charts.NFE, size=charts.COST) for many in (long[:2], long)]
    figures += [charts.plot_classes(names, dots, "squared distance of mean features to real ones", real=[0.1] * 10),
                charts.plot_curves({f"grad/{role}": [(0, 0.01), (9000, 5.0)] for role in ("disc", "fake", "student")}, logarithmic=True)]
    drawn = [(0, 0.01), (9000, 5.0)]
    figures += [charts.plot_curves({f"critic/disc_accuracy{side}": drawn for side in ("", "_real", "_generated")}),
                charts.plot_curves({f"student/score_gap_s{s}": drawn for s in ("00", "25", "50", "75")}),
                charts.plot_curves({f"look/{name}": drawn for name in ("contrast", "saturation", "sharpness", "spread")})]
    for figure in figures:
        figure.draw_without_rendering()
        (left, bottom), (right, top) = figure.bbox.get_points()
        ticks = {tick for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for tick in axis.get_ticklabels(which="both")}
        for text in set(figure.findobj(Text)) - ticks:
            box = text.get_window_extent()
            if text.get_text():
                assert (box.x0 > left - 1, box.x1 < right + 1, box.y0 > bottom - 1, box.y1 < top + 1) == (True,) * 4, text.get_text()


def test_legends_leave_out_what_all_names_begin_with():
    def legend(*names: str) -> list[str]:
        return [text.get_text() for text in charts.plot_curves({name: [(0, 1.0)] for name in names}).legends[0].get_texts()]

    assert legend("student/score_gap_s00", "student/score_gap_s25") == ["s00", "s25"]
    assert legend("critic/disc_accuracy", "critic/disc_accuracy_real") == ["accuracy", "real"]
    assert legend("grad/fake", "grad/student") == ["fake", "student"]


def test_many_models_are_shown_a_few_abreast(four):
    rows = [{**four.value["rows"][i % 4], "label": f"model {i}"} for i in range(tables.ABREAST + 1)]
    found = [table for table in tables.by_class({**four.value, "rows": rows}) if table.title.startswith("Distance")]
    assert [table.title for table in found] == ["Distance by class", "Distance by class, continued"]
    assert [label for table in found for label in table.heads[1:-1]] == [row["label"] for row in rows]
    assert all(len(row) == len(table.heads) for table in found for row in table.rows)


def test_a_strip_holds_the_pictures_as_they_are():
    pictures = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = page.strip("mine", "words", pictures)
    read = np.array(Image.open(io.BytesIO(base64.b64decode(made.uri.partition(",")[2]))))
    for i, picture in enumerate(pictures):
        assert np.array_equal(read[:, 29 * i : 29 * i + 28], picture[0])
    assert (made.width, made.height) == (2 * read.shape[1], 2 * read.shape[0])


def test_lines_end_where_they_may():
    assert page.parts("-0.320 ± 0.025 [-0.371, -0.270]") == ["-0.320 ± 0.025", "[-0.371, -0.270]"]
    assert page.parts("teacher, 25 steps, w = 1.25") == ["teacher,", "25 steps,", "w = 1.25"]
    assert page.prose("0.5 ± 0.1 [0.3, 0.7] in 4 steps, w = 1.5, 95 %").split(" ") == [
        "0.5\u00a0±\u00a00.1", "[0.3,\u00a00.7]", "in", "4\u00a0steps,", "w\u00a0=\u00a01.5,", "95\u00a0%"]


def test_the_same_results_give_the_same_page(four, reference, tmp_path):
    assert write(four.results, tmp_path / "again", four.run).text == four.text


def test_a_page_of_one_result_without_features_or_pictures(made, tmp_path):
    path = made("s", "student", 1, 0.1, with_features=False)
    path.with_name("s.samples.safetensors").unlink()
    page = write([path], tmp_path / "out").page
    assert page.open == []
    assert "1 student: 100 pictures of Fashion-MNIST" in page.words
    assert "without paired differences: student, 1 step" in page.words
    assert not page.all("img")
    assert not re.search("Class by class|Training|★|held against", page.words)


# ---- claims


@pytest.mark.parametrize(("corrected", "se", "half", "word"), [
    (-0.30, 0.1, 0.21, "better"), (0.30, 0.1, 0.21, "worse"), (-0.19, 0.1, 0.15, "undecided"), (-0.205, 0.1, 0.21, "undecided"),
    (0.0, 0.0, 0.0, "undecided")])
def test_a_claim_needs_two_errors_and_an_interval_on_one_side(corrected, se, half, word):
    found = Estimate(corrected, corrected, se, (corrected - half, corrected + half), tables.ENOUGH, 10)
    assert report.judge("frechet_fashion", found) == word
    assert report.judge("accuracy_fashion", found) == {"better": "worse", "worse": "better"}.get(word, word)
    assert report.judge("frechet_fashion", dataclasses.replace(found, n=tables.ENOUGH - 1)) == "undecided"


def test_verdicts_say_what_the_differences_say(four):
    for row in four.value["rows"]:
        if row["is_teacher"]:
            assert row["verdict"] is None
            continue
        block, said = row["difference"]["frechet_fashion"], row["verdict"]
        assert said["word"] == block["verdict"]
        assert ("so better" in said["text"], "so worse" in said["text"]) == (block["verdict"] == "better", block["verdict"] == "worse")
        assert "without a claim, in recall_fashion" in said["text"]
        assert "The teacher itself, cut to 2 evaluations, is at" in said["text"] or row["nfe"] > 2
        assert tables.delta(block) in said["text"]
        assert said["text"] in four.page.words
        assert said["text"] in four.markdown


def test_values_without_bias_stand_beside_their_intervals(four):
    """Of the jackknifed measures alone: a share has no bias to take off. Both files have the table, the figure those values."""
    (table,) = tables.without_bias(four.value)
    assert table.heads == ("model", "frechet_fashion ↓", "kid_fashion ↓")
    for row, line, point in zip(four.value["rows"], table.rows, charts.points(four.value["rows"], "nfe"), strict=True):
        block = row["metrics"]["frechet_fashion"]
        corrected, low, high = (float(part.strip("[],")) for part in line[1].split())
        assert (corrected, low, high) == pytest.approx((block["corrected"], *block["ci95"]), abs=block["se"] / 10)
        assert corrected < block["value"] - block["se"] / 10                    # so few pictures that the bias is plain to see
        assert (point.y, point.low, point.high) == (block["corrected"], *block["ci95"])
        assert line[1] in four.page.words
        assert f"| {' | '.join(line)} |" in four.markdown
    free = ("recall_fashion", "accuracy_fashion")
    shares = [{**row, "metrics": {name: row["metrics"][name] for name in free}} for row in four.value["rows"]]
    assert tables.without_bias({"rows": shares}) == []
    assert charts.without_bias(shares) == ""
    assert "values without bias" in four.page.words


def test_a_bar_is_drawn_around_its_mark():
    """An interval that is not symmetric keeps its two ends."""
    points = [charts.Point("a", "a", False, 1, 0.9, 0.7, 0.95), charts.Point("b", "b", False, 2, 0.5, 0.4, 0.6)]
    figure = charts.plot_quality(points, charts.NFE)
    ends = [[float(y) for y in bar.get_segments()[0][:, 1]] for box in figure.axes[0].containers for bar in box[2]]
    assert ends == [pytest.approx([0.7, 0.95]), pytest.approx([0.4, 0.6])]


def test_nothing_is_claimed_without_features(made, tmp_path):
    results = [made("t", "teacher:fashion", 50, 0.1, is_teacher=True), made("s", "student", 1, 0.9, with_features=False)]
    told = write(results, tmp_path / "out")
    assert told.value["rows"][1]["verdict"]["word"] == "unpaired"
    assert "no claim" in told.value["rows"][1]["verdict"]["text"]
    assert not re.search("so (better|worse)|★", told.markdown)


def test_few_pictures_show_nothing(four, made, tmp_path, monkeypatch):
    """A student far behind its teacher is called neither better nor worse, and both files say why."""
    assert "Nothing can be concluded" not in four.page.words
    monkeypatch.setattr(tables, "ENOUGH", COUNT + 1)
    told = write([made("t", "teacher:fashion", 50, 0.1, is_teacher=True), made("s", "student", 1, 0.9)], tmp_path / "out")
    assert told.value["rows"][1]["verdict"]["word"] == "undecided"
    assert "too uncertain from so few pictures" in told.page.words
    for text in (told.page.words, told.markdown):
        assert f"Nothing can be concluded from {COUNT} pictures." in text
        assert not re.search("so (better|worse)|★|▲", text)


def test_a_star_needs_a_lead_over_every_row(four, made, tmp_path):
    """A copy of the leader takes its star away: the difference of the two is nothing."""
    value = four.value
    leaders = {name: row["label"] for row in value["rows"] for name in row["best"]}
    assert leaders["kid_fashion"] == min(value["rows"], key=lambda r: r["metrics"]["kid_fashion"]["value"])["label"]
    assert "recall_fashion" not in leaders
    assert "★" in four.page.words
    shifts = {"student, 4 steps": 0.02, "teacher, 50 steps, w = 1.5": 0.15}
    again = report.compare([*four.results, made("copy", "copy", 8, shifts[leaders["kid_fashion"]])], tmp_path / "again")
    assert not any("kid_fashion" in row["best"] for row in again["rows"])


# ---- taken apart


def test_wins_are_counted():
    here, there = torch.tensor([1, 1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 0, 1, 0, 0]).bool()
    won = breakdown.wins(here, there)
    assert (won.ahead, won.behind, won.decided) == (0.5, pytest.approx(1 / 6), 4)
    assert won.share == metrics.proportion(torch.tensor([True, True, True, False]))
    assert breakdown.wins(here, here).share is None
    with pytest.raises(ValueError, match="same samples"):
        breakdown.wins(here, there[:3])


def test_wins_add_up_to_the_difference(four):
    value = four.value
    assert value["rows"][0]["wins"] is None
    for row in value["rows"][1:]:
        assert list(row["wins"]) == ["precision_fashion", "accuracy_fashion"]
        for name, block in row["wins"].items():
            assert block["ahead"] - block["behind"] == pytest.approx(row["difference"][name]["delta"])
            assert block["decided"] == round(100 * (block["ahead"] + block["behind"]))
            assert block["win_rate"] is None or block["win_rate"] * block["decided"] == pytest.approx(100 * block["ahead"])


def test_class_distances_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels, features = torch.arange(60) % 3, torch.randn(60, 4, generator=generator)
    member, real = metrics.members(60, 5, 3), torch.randn(3, 4, generator=generator).double()
    found = breakdown.class_distances(features, labels, real, member)
    for label in range(3):
        of = lambda keep, c=label: float((features[(labels == c) & keep].double().mean(0) - real[c]).square().sum())         # noqa: E731
        whole = metrics.jackknife(of(member >= 0), [of(member != j) for j in range(5)], 20)
        assert (found[label].value, found[label].corrected, found[label].se) == pytest.approx((whole.value, whole.corrected, whole.se))
    means = breakdown.class_means(features, labels, 3)
    assert torch.allclose(means[1], features[1::3].double().mean(0))
    with pytest.raises(ValueError, match="class 3"):
        breakdown.class_means(features, labels, 4)


def test_classes_add_up_to_the_whole(four):
    """Balanced labels: the mean of the classes' accuracies is the accuracy; and the tables show every class."""
    value = four.value
    for row in value["rows"]:
        shares = row["classes"]["accuracy_fashion"]["value"]
        assert sum(shares) / len(shares) == pytest.approx(row["metrics"]["accuracy_fashion"]["value"])
        assert min(row["classes"]["distance"]["value"]) > 0
        shares = row["classes"]["precision_fashion"]["value"]
        assert sum(shares) / len(shares) == pytest.approx(row["metrics"]["precision_fashion"]["value"])
    for name in value["classes"]["names"]:
        assert four.markdown.count(f"\n| {name} |") == 3                        # precision, accuracy, distance


def test_the_pareto_front():
    made = [charts.Point(str(i), "", False, x, y, y, y) for i, (x, y) in enumerate([(1, 5), (2, 6), (2, 4), (3, 4), (8, 1)])]
    assert [point.label for point in charts.front(made)] == ["0", "2", "4"]


# ---- how it was made


@pytest.mark.parametrize("times", [trailing(25, 0.5), trailing(4), trailing(1), trailing(2, 3.0)])
def test_the_shift_of_a_grid_is_found(times):
    shift = provenance.shift_of(times)
    assert trailing(len(times), shift) == pytest.approx(times)


def test_other_times_have_no_shift():
    assert [provenance.shift_of(times) for times in ([0.4], [0.5, 0.5], [1.0, 0.7, 0.1], [])] == [None] * 4


def test_commands_open_the_same_sampler():
    """The command of each stored result of the teacher opens the sampler that the result states."""
    for path in stored_results("fashion"):
        result = json.loads(path.read_text())
        words = shlex.split(provenance.command(result, path.name), comments=True)
        assert words[:3] == ["stepdistill", "eval", result["model"]["name"]]
        told = dict(zip(words[3::2], words[4::2], strict=True))
        assert (told["--count"], told["--seed"], told["--to"]) == (str(result["protocol"]["count"]), "0", path.name)
        opened = open_model(words[2], int(told["--steps"]), float(told["--guidance"]), solver=told["--solver"],
                            renoise=float(told["--renoise"]), shift=float(told["--shift"]))
        stated = {key: tuple(value) if isinstance(value, list) else value for key, value in result["sampler"].items()}
        assert opened.spec.times == pytest.approx(stated.pop("times"))
        assert opened.spec.nfe == stated.pop("nfe")
        assert stated == {key: getattr(opened.spec, key) for key in stated}


def test_markdown_tells_the_environment(four):
    """As the page does: what the rows share, what they do not, row by row, and how each is made again."""
    told = four.markdown.partition("## Environment")[2]
    assert "- torch: 2.0\n" in told
    assert "- threads" not in told
    table = tables.made(four.value)
    assert table.heads[-1] == "≠ threads"
    assert [row[-1] for row in table.rows] == ["1", "1", "2", "1"]
    assert all(f"| {' | '.join(row)} |" in told for row in table.rows)
    assert all(command in told for row in four.value["rows"] for command in row["commands"])


def test_a_command_says_what_it_cannot(made):
    at = json.loads(made("t", "my teacher", 2, 0.1, is_teacher=True, times=[0.9, 0.2]).read_text())
    assert provenance.command(at, "t.json").endswith("# at times that no option names")
    student = json.loads(made("s", "my student", 1, 0.1, times=[0.4], env={"device_type": "cuda"}).read_text())
    assert provenance.command(student, "s.json") == ("stepdistill eval 'my student' --protocol fashion --count 100 --seed 0 --steps 1 "
                                                     "--guidance 1.0 --device cuda --to s.json")


# ---- training


def test_healthy_curves_are_described_in_the_readmes_words():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [line.split("|")[2] for line in readme.split("## Reading the curves")[1].split("## ")[0].splitlines() if line.startswith("| `")]
    for curve in curves.CURVES:
        assert any(curve.healthy in cell for cell in cells), curve.title


@pytest.mark.parametrize("name", [
    "student/score_gap", "student/score_gap_2", "student/score_gap_s25", "critic/denoise", "critic/denoise_1", "critic/disc_accuracy",
    "critic/disc_accuracy_real", "disc/disc_accuracy_generated", "student/x0_mean", "student/x0_std", "grad/disc", "moved/fake_1",
    "update/student", "ema/distance", "look/contrast", "exam/kid_fashion", "exam_raw/frechet_tiny_teacher"])
def test_what_a_run_logs_is_drawn_once(name):
    assert len([curve for curve in curves.CURVES if curves.lines([{"step": 0, name: 1.0}], curve.names)]) == 1


def test_an_ill_run_is_told(made, tmp_path):
    trained = trained_in(tmp_path)
    rows = [json.loads(line) | {"critic/disc_accuracy": 0.99} for line in (trained / "log.jsonl").read_text().splitlines()]
    rows[3]["student/score_gap"] = float("nan")
    (trained / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = write([made("s", "student", 1, 0.1)], tmp_path / "out", trained)
    assert [finding["illness"] for finding in told.value["runs"][0]["findings"]] == ["discriminator saturated"]
    assert "▼ ill" in told.page.words
    assert "illness discriminator saturated" in told.page.words
    assert "what helps lower method.gan_weight" in told.page.words
    assert re.search(r"ill: dmd2, 640 of 640 steps: 1 known illness seen\.\n\n- discriminator saturated: .* What helps:", told.markdown)
    gap = next(drawn for curve, drawn in curves.read(trained).curves if curve.title == "Gap of the scores")
    assert len(gap["student/score_gap"]) == sum("student/score_gap" in row for row in rows) - 1
    assert gap["student/score_gap"][0] == (rows[0]["step"], rows[0]["student/score_gap"])


def test_a_short_run_is_not_called_healthy(made, tmp_path):
    trained = trained_in(tmp_path)
    log = (trained / "log.jsonl").read_text().splitlines(keepends=True)
    for count, word in ((diagnose.LEAST - 1, "unknown"), (diagnose.LEAST, "healthy")):
        (trained / "log.jsonl").write_text("".join(log[:count]))
        assert curves.read(trained).word == word
    (trained / "log.jsonl").write_text(log[0])
    words = write([made("s", "student", 1, 0.1)], tmp_path / "out", trained).page.words
    assert "? unknown dmd2, 10 of 640 steps: 1 line in the log" in words
    assert "healthy dmd2" not in words


def test_exams_are_drawn_without_their_errors():
    """Of the average and the raw weights in one chart, which names them."""
    rows = [{"step": s, "exam/kid_fashion": 0.2, "exam/kid_fashion_se": 0.1, "exam_raw/kid_fashion": 0.3} for s in (9, 19)]
    curve = next(curve for curve in curves.CURVES if "kid" in curve.names)
    drawn = curves.lines(rows, curve.names)
    assert list(drawn) == ["exam/kid_fashion", "exam_raw/kid_fashion"]
    assert [text.get_text() for text in charts.plot_curves(drawn).legends[0].get_texts()] == ["exam", "exam_raw"]


def test_a_folder_that_is_no_run_is_refused(made, tmp_path, capfd):
    path = made("s", "student", 1, 0.1)
    assert command(["compare", str(path), "--to", str(tmp_path / "out"), "--run", str(tmp_path / "none")]) == 2
    assert "is not a run" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_best_and_the_worst_are_found():
    """By the means over the models, of columns of values; all of them where they are few."""
    values = torch.stack([torch.arange(30.0), torch.arange(30.0).flip(0) * 3])
    assert breakdown.extremes(values, upwards=True, each=2) == [0, 1, 28, 29]
    assert breakdown.extremes(values, upwards=False, each=2) == [29, 28, 1, 0]
    assert breakdown.extremes(values[:, :4], upwards=False, each=2) == [3, 2, 1, 0]


def test_of_many_classes_the_best_and_the_worst_are_shown():
    """With their own errors, and without where a class has one value."""
    blocks = {"accuracy_x": {"value": [i / 100 for i in range(50)], "se": [0.001] * 50}, "variety_x": {"value": [0.5] * 50, "se": None}}
    told = {"rows": [{"label": "student", "classes": blocks, "groups": None}, {"label": "pictures", "classes": None, "groups": None}],
            "classes": {"names": [f"class {c}" for c in range(50)], "real_distance": []}, "prompts": {"first": [], "extremes": {}}}
    accuracy, variety = tables.by_class(told)
    assert [row[0] for row in accuracy.rows] == [f"class {c}" for c in (*range(49, 39, -1), *range(9, -1, -1))]
    assert accuracy.heads == ("class", "student")
    assert accuracy.rows[0][1] == "0.4900 ± 0.0010"
    assert "10 worst of 50" in accuracy.note
    assert variety.rows[0][1] == "0.5000"


def test_prompts_are_shown_with_their_words():
    extremes = {"clip_x": {"count": 30, "chosen": [4, 2], "texts": ["a cat", "a | dog"], "values": [[0.25, 0.125], None, [0.5, 0.375]]}}
    told = {"rows": [{"label": label, "classes": None, "groups": None} for label in ("teacher", "pictures", "student")],
            "classes": {"names": [], "real_distance": []}, "prompts": {"first": [], "extremes": extremes}}
    (table,) = tables.by_class(told)
    assert table.heads == ("prompt", "teacher", "student")
    assert table.rows == [("a cat", "0.2500", "0.5000"), ("a | dog", "0.1250", "0.3750")]
    assert "of 30" in table.note


WORDS = ["a cat", "a dog", "snow", "rain", "fog"]


@pytest.mark.parametrize(("side", "captions", "width"), [(8, WORDS, 4), (200, WORDS[:4], 1)])
def test_grids_have_the_words_of_their_prompts(side, captions, width):
    """Picture i has prompt i mod their number; of large pictures there are fewer."""
    pictures = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 3, side, side)
    told = {"protocol": {"prompts": 20, "classes": 0}, "classes": {"names": []},
            "prompts": {"first": WORDS, "extremes": {}}}
    found = page._grids(told, [("mine", pictures)])
    assert [name for name, _ in found] == captions
    read = np.array(Image.open(io.BytesIO(base64.b64decode(found[1][1][0].uri.partition(",")[2]))))
    assert [int(read[0, (side + 1) * i, 0]) for i in range(width)] == [1, 21, 41, 61][:width]
    assert read.shape[1] == (side + 1) * width - 1
    ((caption, _),) = page._grids({**told, "prompts": {"first": [], "extremes": {}}}, [("mine", pictures)])
    assert caption == "The first pictures"


def test_single_small_pictures_are_one_table():
    """Rows are models, columns prompts; whoever has no picture of a prompt leaves its cell empty."""
    told = {"protocol": {"prompts": 3, "classes": 0}, "classes": {"names": []}, "prompts": {"first": WORDS[:3], "extremes": {}}}

    def grids(count: int, side: int = 8):
        pictures = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        return page._grids(told, [("mine", pictures), ("theirs", pictures[:2])])

    found = page.matrix(grids(3))
    assert [(model, [strip and strip.words for strip in row]) for model, row in found] == [
        ("mine", [f"{words} by mine, 1 seed" for words in WORDS[:3]]),
        ("theirs", [*(f"{words} by theirs, 1 seed" for words in WORDS[:2]), None])]
    assert not page.matrix(grids(6))                                                # two seeds
    assert not page.matrix(grids(3, side=200))
    assert not page.matrix([("a" * (page.NARROW + 1), strips) for _, strips in grids(3)])
    assert not page.matrix(grids(3)[:1])


def test_groups_of_prompts_stand_side_by_side():
    def block(value: float) -> dict[str, float]:
        return {"value": value, "se": 0.01}

    both = {"clip_x_cos": {"food": block(0.5), "flags": block(0.25)}}
    rows = [{"label": "teacher", "groups": both}, {"label": "pictures", "groups": None},
            {"label": "student", "groups": {"clip_x_cos": {"food": block(0.75)}}}]
    (found,) = tables.by_group({"rows": rows})
    assert found.heads == ("group", "teacher", "student")
    assert [row[0] for row in found.rows] == ["food", "flags"]
    assert [cell.split(" ")[0] for cell in found.rows[0][1:]] == ["0.500", "0.750"]
    assert found.rows[1][2] == ""
