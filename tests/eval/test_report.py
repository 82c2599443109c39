"""Results side by side: the order of rows, paired differences, the files, and what is refused."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from stepdistill.cli import run as command
from stepdistill.eval import alignment, charts, measures, metrics, pairing, protocol, report, score, tables, timings


def test_report(made, tmp_path):
    """A student named first still stands below the teachers; of teachers with equal steps the better stands first."""
    paths = [made("s4", "runs/dmd2/export", 4, 0.1), made("t2", "teacher:fashion", 2, 0.3, is_teacher=True),
             made("t50", "teacher:fashion", 50, 0.05, is_teacher=True, guidance=1.5), made("s1", "runs/dmd2/export", 1, 0.2)]
    to = tmp_path / "deep" / "report"
    value = report.compare(paths, to)
    assert [row["label"] for row in value["rows"]] == [
        "teacher, 50 steps, w = 1.5", "teacher, 2 steps", "export, 1 step", "export, 4 steps"]
    assert [row["nfe"] for row in value["rows"]] == [100, 2, 1, 4]
    assert sorted(p.name for p in to.iterdir()) == ["quality_vs_ms.png", "quality_vs_nfe.png", "report.html", "report.json", "report.md",
                                                      "samples.png"]
    assert json.loads((to / "report.json").read_text()) == value
    assert not list(to.parent.glob(".*"))
    page = (to / "report.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[1:5]] == [row["label"] for row in value["rows"]]
    assert table[1].split("|")[2].strip() == "100"
    assert table[1].split("|")[-2].strip() == "100.00"
    for name in ("quality_vs_nfe.png", "quality_vs_ms.png", "samples.png"):
        assert min(Image.open(to / name).size) > 200
        assert name in page


def test_differences_are_paired(made, tmp_path, reference):
    paths = [made("t", "teacher:fashion", 50, 0.1, is_teacher=True), made("s", "export", 1, 0.2)]
    first, second = report.compare(paths, tmp_path / "out")["rows"]
    assert first["difference"] is None
    delta, single = second["difference"], second["metrics"]
    assert list(delta) == ["frechet_fashion", "kid_fashion", "precision_fashion", "accuracy_fashion"]
    for name, block in delta.items():
        assert block["delta"] == pytest.approx(single[name]["value"] - first["metrics"][name]["value"])
        assert block["ci95"][0] < block["corrected"] < block["ci95"][1]
    # equal covariances: the distance grows by the squared shift, and by twice the shift times the offset of the means
    rows = score.read_features(paths[0], score.read_result(paths[0]))["features"].double()
    offset = float((rows.mean(0) - reference.train.mean).sum())
    assert delta["frechet_fashion"]["delta"] == pytest.approx(2 * 0.1 * offset + 64 * 0.1**2, rel=1e-3)
    assert delta["frechet_fashion"]["se"] < single["frechet_fashion"]["se"]


def test_without_features_or_samples_the_rest_is_written(made, tmp_path):
    paths = [made("t", "teacher:fashion", 50, 0.1, is_teacher=True), made("s", "export", 1, 0.2, with_features=False)]
    for path in paths:
        score.samples_path(path).unlink()
    value = report.compare(paths, tmp_path / "out")
    assert value["rows"][1]["difference"] == {}
    assert "Difference" not in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "samples.png").exists()


def test_a_second_report_replaces_the_first(made, tmp_path):
    a, b = made("a", "a", 1, 0.1), made("b", "b", 1, 0.2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    report.compare([a], tmp_path / "out")
    report.compare([a, b], tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rows"]) == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_equal_names_are_told_apart(made, tmp_path):
    value = report.compare([made("x", "run/a", 1, 0.1), made("y", "run/a", 1, 0.2)], tmp_path / "out")
    assert [row["label"] for row in value["rows"]] == ["a, 1 step (x)", "a, 1 step (y)"]


def test_models_keep_their_own_names(made, tmp_path):
    """Folders that end alike are told apart by their parents, in the table and in the plot."""
    paths = [made("x", "runs/dmd2/student", 1, 0.1), made("y", "runs/lcm/student/", 1, 0.2), made("z", "runs/lcm/student/", 4, 0.1)]
    assert [r["label"] for r in report.compare(paths, tmp_path / "out")["rows"]] == [
        "dmd2/student, 1 step", "lcm/student, 1 step", "lcm/student, 4 steps"]


def test_unequal_protocols_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"different protocols \(seed: 0 and 1\)") as caught:
        report.compare([made("a", "a", 1, 0.1), made("b", "b", 1, 0.1, seed=1)], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_results_of_three_seeds_are_one_row(made, tmp_path):
    """Mean and standard deviation over seeds; differences are paired within each seed, and seeds are independent."""
    shifts = {"t": (0.05, 0.07, 0.06), "s": (0.2, 0.21, 0.25)}
    paths = {stem: [made(f"{stem}{seed}", stem, 4, shift, seed=seed, is_teacher=stem == "t") for seed, shift in enumerate(each)]
             for stem, each in shifts.items()}
    value = report.compare([*paths["s"], *paths["t"][::-1]], tmp_path / "out", over_seeds=True)
    assert [row["label"] for row in value["rows"]] == ["teacher, 4 steps", "s, 4 steps"]
    assert value["seeds"] == [0, 1, 2]
    singles = [[metrics.Estimate(**{**score.read_result(path)["metrics"]["frechet_fashion"]}) for path in paths[stem]] for stem in "ts"]
    for row, each in zip(value["rows"], singles, strict=True):
        values = [one.value for one in each]
        block = row["metrics"]["frechet_fashion"]
        assert block["value"] == pytest.approx(statistics.fmean(values))
        assert block["se"] == pytest.approx(statistics.stdev(values))
        assert block["ci95"][1] - block["value"] == pytest.approx(4.3027 * block["se"] / 3**0.5)
        assert row["seeds"]["values"]["frechet_fashion"] == values
        assert row["seeds"]["least"] == {"frechet_min3_fashion": min(values)}
    paired = [report.pairings(report.arrange([(path, score.read_result(path)) for path in pair]))["frechet_fashion"].difference(1, 0)
              for pair in zip(paths["t"], paths["s"], strict=True)]
    found = value["rows"][1]["difference"]["frechet_fashion"]
    assert found["delta"] == pytest.approx(statistics.fmean(one.value for one in paired))
    assert found["se"] == pytest.approx(sum(one.se**2 for one in paired) ** 0.5 / 3)
    assert found["ci95"][0] < found["corrected"] < found["ci95"][1]
    page = (tmp_path / "out" / "report.md").read_text()
    for words in ("seeds 0, 1, 2, hash without the seed", "Values are means over the seeds 0, 1, 2, ±", "## Seed by seed", "| min3 |"):
        assert words in page
    assert sum("--seed 2" in command for row in value["rows"] for command in row["commands"]) == 2
    assert "## Without bias" not in page                                        # intervals stand around the means
    means = [row["metrics"]["frechet_fashion"]["value"] for row in value["rows"]]
    assert [point.y for point in charts.points(value["rows"], "nfe")] == means
    assert "bars are 95 % intervals of the mean over seeds" in (tmp_path / "out" / "report.html").read_text().replace("\xa0", " ")
    two = report.compare([*paths["s"][:2], *paths["t"][:2]], tmp_path / "two", over_seeds=True)
    assert two["rows"][0]["seeds"]["least"] == {}


@pytest.mark.parametrize(("second", "words"), [
    ({"stem": "b", "name": "a", "seed": 0}, "are of one model and seed 0: name one of them"),
    ({"stem": "b", "name": "b", "seed": 1}, r"a\.json has the seeds 0 and .*b\.json has 1: score all models with the same seeds"),
    ({"stem": "b", "name": "b", "seed": 0}, "two seeds or more"),
])
def test_seeds_that_do_not_go_together_are_refused(made, tmp_path, second, words):
    with pytest.raises(ValueError, match=words) as caught:
        report.compare([made("a", "a", 1, 0.1), made(steps=1, shift=0.1, **second)], tmp_path / "out", over_seeds=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_more_than_another_seed_is_refused(made, tmp_path):
    paths = [made("a", "a", 1, 0.1), made("b", "a", 1, 0.1, seed=1)]
    result = json.loads(paths[1].read_text())
    told = {**result["protocol"], "neighbours": 4}
    paths[1].write_text(json.dumps({**result, "protocol": told, "protocol_hash": protocol.hash_of(told)}))
    with pytest.raises(ValueError, match=r"different protocols \(neighbours: 3 and 4\)"):
        report.compare(paths, tmp_path / "out", over_seeds=True)


def test_seeds_of_one_prompt_are_one_value():
    """Prompts come again under every seed, so their means are paired; samples do not."""
    drawn = torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = metrics.Estimate(0.0, 0.0, 0.0, (0.0, 0.0), 12, 12)
    each = [pairing.Pairing(measures.KINDS["variety"], [measures.Found(some, values=row) for row in seed]) for seed in drawn]
    means = drawn.mean(0)
    assert pairing.OverSeeds(each).difference(0, 1) == alignment.paired_means(means[0], means[1]).delta
    hits = [pairing.Pairing(measures.KINDS["accuracy"], [measures.Found(some, values=row > 0.5) for row in seed]) for seed in drawn]
    won = pairing.OverSeeds(hits).wins(0, 1)
    assert won.ahead == pytest.approx(float(((drawn[:, 0] > 0.5) & ~(drawn[:, 1] > 0.5)).double().mean()))


def test_other_wrong_input(made, tmp_path):
    path = made("a", "a", 1, 0.1)
    with pytest.raises(ValueError, match="twice"):
        report.compare([path, path], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one"):
        report.compare([], tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        report.compare([path], path)
    with pytest.raises(FileNotFoundError, match="stepdistill eval"):
        report.compare([tmp_path / "none.json"], tmp_path / "out")


def timed(path, *models):
    """A file of `bench speed`: of each model its digest, its calls, and the medians of denoiser, with text and with decoder at batch 4."""
    spans = [dict(zip(timings.SPANS, (None if ms is None else {"median": ms} for ms in medians), strict=True)) for *_, medians in models]
    rows = [{"model": {"name": "export", "sha256": digest}, "sampler": {"nfe": nfe},
             "batches": [{"batch": 8, "ms": dict.fromkeys(timings.SPANS)}, {"batch": 4, "ms": ms}]}
            for (digest, nfe, _), ms in zip(models, spans, strict=True)]
    path.write_text(json.dumps({"rows": rows, "env": {"device": "x86_64", "device_type": "cpu", "threads": 2, "precision": "fp32"}}))
    return path


def of_weights(path, digest):
    """A result whose model has these weights."""
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "model": {**result["model"], "sha256": digest}}))
    return path


def test_milliseconds_of_bench_speed(made, tmp_path):
    """By weights and calls, for one picture, at the smallest batch; the figure takes the widest span that all timed models have."""
    paths = [of_weights(made("t", "teacher:fashion", 50, 0.1, is_teacher=True), "aa"),
             of_weights(made("t2", "teacher:fashion", 2, 0.3, is_teacher=True), "aa"), of_weights(made("s", "export", 1, 0.2), "bb")]
    speed = timed(tmp_path / "speed.json", ("aa", 50, (400.0, 404.0, 440.0)), ("bb", 1, (8.0, None, 10.0)), ("cc", 1, (1.0, None, 1.0)))
    value = report.compare(paths, tmp_path / "out", speed=speed)
    assert [row["ms_per_image"] for row in value["rows"]] == [110.0, None, 2.5]
    assert (value["speed"]["span"], value["speed"]["batch"]) == ("with_decoder", 4)
    table = tables.scores(value)
    assert table.heads[-3:] == ("ms, of the denoiser", "ms, with text encoders", "ms, with decoder")
    assert [row[-3:] for row in table.rows] == [("100.00", "101.00", "110.00"), ("", "", ""), ("2.00", "", "2.50")]
    assert "Not timed there: teacher, 2 steps." in table.note
    assert [point.x for point in charts.points(value["rows"], "ms_per_image")] == [110.0, 2.5]
    text, page = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert "| ms, with decoder |" in text
    assert "the figure has those with decoder" in page


def test_milliseconds_of_parts_that_all_have(made, tmp_path):
    paths = [of_weights(made("t", "teacher:fashion", 50, 0.1, is_teacher=True), "aa"), of_weights(made("s", "export", 1, 0.2), "bb")]
    speed = timed(tmp_path / "speed.json", ("aa", 50, (400.0, None, None)), ("bb", 1, (8.0, None, 10.0)))
    value = report.compare(paths, tmp_path / "out", speed=speed)
    assert value["speed"]["span"] == "denoiser"
    assert [row["ms_per_image"] for row in value["rows"]] == [100.0, 2.0]


def test_timings_that_do_not_fit_are_refused(made, tmp_path, capfd):
    path = of_weights(made("s", "export", 4, 0.2), "bb")
    other = timed(tmp_path / "other.json", ("bb", 1, (8.0, None, 10.0)))
    wrong = {other: "times none of these models with as many calls, but export (bb, NFE 1)",
             tmp_path / "none.json": "no timings", path: "is no file of timings"}
    nameless = timed(tmp_path / "nameless.json", (None, 4, (8.0, None, 10.0)))
    assert timings.read(nameless).of({"model": {"name": "a folder of pictures"}, "sampler": {"nfe": 4}}) is None
    for speed, words in wrong.items():
        assert command(["compare", str(path), "--to", str(tmp_path / "out"), "--speed", str(speed)]) == 2
        told = capfd.readouterr().err
        assert words in told
        assert "stepdistill bench speed MODEL --to" in told
        assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "se", "text"), [(8.7123, 0.0512, "8.712 ± 0.051"), (0.5, 0.2, "0.50 ± 0.20"), (123.4, 12.0, "123 ± 12"),
                                                   (0.25, 0.0, "0.2500 ± 0.0000")])
def test_numbers_stop_at_their_error(value, se, text):
    assert report.number(value, se) == text


def test_many_comparisons_ask_for_more_than_one():
    """A difference of 2.2 standard errors is a claim between three rows, and none among six."""
    found = metrics.Estimate(-1.0, -1.0, 0.45, (-1.93, -0.07), 5000, 25)
    paired = {"frechet_fashion": SimpleNamespace(difference=lambda i, j: found)}
    rows = [SimpleNamespace(result={"protocol": {"count": 5000}})] * 6
    few, many = (report.differences(rows[:n], paired)[1:] for n in (3, 6))
    assert [block["frechet_fashion"]["verdict"] for block in few] == ["better"] * 2
    assert [block["frechet_fashion"]["verdict"] for block in many] == ["undecided"] * 5
    assert many[0]["frechet_fashion"]["p_holm"] == pytest.approx(5 * alignment.p_value(found))
    assert "p_holm" not in few[0]["frechet_fashion"]


def test_the_best_of_many_needs_more_than_the_best_of_few():
    """2.2 standard errors ahead of every other row: a star among three rows, none among six."""
    found = metrics.Estimate(-1.0, -1.0, 0.45, (-1.93, -0.07), 5000, 25)
    pairing = SimpleNamespace(difference=lambda i, j: found)
    rows = [SimpleNamespace(result={"protocol": {"count": 5000}}, metric=lambda name, i=i: {"value": float(i)}) for i in range(6)]
    assert [report.best(rows[:n], "frechet_fashion", pairing) for n in (3, 6)] == [0, None]


def test_the_page_counts_the_comparisons_that_holm_counts(made, tmp_path):
    """Every row with a difference, be it the teacher's; one without features is none."""
    paths = [made("t", "teacher:fashion", 50, 0.1, is_teacher=True), made("t1", "teacher:fashion", 1, 0.6, is_teacher=True),
             made("a", "a", 1, 0.2), made("b", "b", 1, 0.3), made("c", "c", 1, 0.4, with_features=False)]
    for extra, told in (((), ""), ((made("d", "d", 1, 0.1001),), "4 rows are held against the first.")):
        value = report.compare([*paths, *extra], tmp_path / "out")
        text, page = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
        (table,) = (t for t in tables.paired(value) if t.title.startswith("Difference"))
        assert tables.correction(value).startswith(told)
        assert all(("p_holm" in block) == bool(extra) for row in value["rows"][1:] for block in row["difference"].values())
        assert table.heads[:3] == ("model", "frechet_fashion", "p" if extra else "kid_fashion")
        assert all(len(row) == len(table.heads) for row in table.rows)
        if extra:
            assert page.count(told) == 2                                        # above the tables, and in the one of the differences
            assert all(f"| {' | '.join(row)} |" in text for row in table.rows)
            p = table.rows[-1][2]
            assert p == tables.p_value(value["rows"][-1]["difference"]["frechet_fashion"])
            assert f"p {p} adjusted" in value["rows"][-1]["verdict"]["text"]
