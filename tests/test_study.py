"""The study: set-ups that claim to be the library's are, and the tables agree with the rows."""

import csv
import subprocess
import sys

import pytest
import torch

import tinyti
from notebooks import setups, study
from tinyti import Inversion

from .conftest import ROOT, TINY, seeded


@pytest.fixture(scope="module")
def model():
    return tinyti.load(TINY)


@pytest.fixture
def robot(model):
    return study.Data(model, "robot")


def walk(function, width, steps=7, n=1):
    """Where an optimizer goes on gradients that are the same for all."""
    vectors, memory, generator = torch.zeros(n, width), {}, seeded()
    for _ in range(steps):
        vectors, memory = function(vectors, torch.randn(4, n, width, generator=generator), memory)
    return vectors


def test_the_default_is_the_librarys(model, robot):
    setups.use(model, {})
    width = model.text.table.shape[1]
    state = Inversion(model, model.add_word("S*", torch.zeros(1, width)))
    ours = walk(state.optimizer, width)
    torch.testing.assert_close(walk(setups.directions()(model, robot), width), ours)
    torch.testing.assert_close(walk(setups.as_one(model, robot), width), ours)  # of one vector
    others = (setups.directions(0.5), setups.directions(falls=True), setups.directions(weight=0.3))
    others += (setups.lengths(0.15, 1), setups.directions(weight=0.3, towards="noun"))
    for other in others:
        assert not torch.allclose(walk(other(model, robot), width), ours, atol=1e-3)


def test_what_falls_ends_and_what_has_a_cap_keeps_it(model, robot):
    real, width = setups.word_length(model.text.table), model.text.table.shape[1]
    falling = setups.directions(falls=True)(model, robot)
    start = torch.nn.functional.normalize(torch.ones(1, width), dim=-1) * real
    _, memory = falling(start, torch.randn(4, 1, width, generator=seeded()), {})
    last, _ = falling(start, torch.randn(4, 1, width, generator=seeded(1)), memory | {"step": setups.STEPS})
    torch.testing.assert_close(last, start)
    assert walk(setups.lengths(0.5, 0.74)(model, robot), width).norm().item() == pytest.approx(0.74 * real)
    first = walk(setups.lengths(0.1, 1)(model, robot), width, steps=1)
    assert first.norm().item() == pytest.approx(0.1 * real)


def test_a_word_for_each_picture_learns_from_its_own_only(model, robot, monkeypatch):
    """Prompts name the picture's word; a word whose picture is not drawn has no gradient."""
    drawn, real = [], setups.invert

    def one_step(model, state, examples, steps=1, **options):
        drawn.extend(examples.prompts)
        yield from real(model, state, examples, 1, batch_size=1, seed=options["seed"])
        moved = state.vectors.norm(dim=-1) > 0
        assert moved[0] and moved[1:].sum() == 1

    monkeypatch.setattr(setups, "invert", one_step)
    words = setups.per_image(model, robot, 0)
    assert {name: tuple(v.shape) for name, v in words.items()} == {"S*": (1, model.text.table.shape[1])}
    assert all(f"with S{i}" in line and "S*" in line for i, lines in enumerate(drawn, 1) for line in lines)


def test_a_mask_is_where_the_ground_does_not_show(robot):
    [photo] = setups.one_ground("max", count=1)(robot, 0)
    assert study.ground(setups.to_image(photo.pixels)) == setups.ground_of(0) == "green"
    border = torch.cat([photo.mask[0, 0], photo.mask[0, -1], photo.mask[0, :, 0], photo.mask[0, :, -1]])
    assert border.sum() == 0 and photo.mask[0, 28:40, 28:36].all() and 0.2 < photo.mask.mean() < 0.8


def row(setup, seed, name="robot", **values):
    about = {"setup": setup, "set": name, "seed": str(seed), "count": "16"}
    return dict.fromkeys(study.COLUMNS, "") | about | values


def test_obedience_counts_what_the_model_can_draw():
    rows = [row(study.NOUN, 0, scarf="1", hat="0.4", red="0.5"), row(study.NOUN, 1, scarf="0.5", hat="0.5")]
    rows += [row("default", 0, scarf="0.25", hat="1", red="0.75", neon="1")]
    rows += [row("default", 0, "cat", red="1")]
    assert study.able_edits(rows)["robot"] == ["scarf", "red"]  # hats in 45 %
    assert study.obedience(rows)[2:] == [0.5, None]  # of the cat's noun there is no row
    many = row(study.NOUN, 0, scarf="0.4", hat="1", red="1", count="64")
    assert study.able_edits([many, *rows])["robot"] == ["hat", "red"]  # the most pictures decide


def test_a_table_has_the_rows_of_its_number_of_pictures():
    rows = [row("default", 0, loss="1", count="8"), row("default", 0, loss="3")]
    loss = [study.summary(rows, table)["default"]["loss"] for table in ("settings", "paper")]
    assert loss == [(1, None), (3, None)]


def test_the_spread_is_of_the_seeds_means():
    rows = [row("default", seed, loss=loss) for seed, loss in ((0, 1), (0, 3), (1, 4), (1, 8), (2, ""))]
    assert study.spread(rows, [r["loss"] for r in rows]) == (4.0, pytest.approx(8**0.5))
    assert study.spread(rows[:2], [1, 3]) == (2.0, None) and study.spread(rows[4:], [""]) is None


def test_missing_rows_are_shown_as_missing():
    table = study.markdown([row("default", 0, **{"the one": "0.5"})], "paper").splitlines()
    [default] = [line for line in table if "| default |" in line]
    assert default.startswith("| 3 | default | 1 |") and "0.50" in default
    assert all("| missing |" in line for line in table[2:] if line != default)
    assert len(table) == 2 + len(setups.PAPER)


FORMS = {  # of tests/bench/README.md: what a row is called there, and in the study
    "turn .12 (default)": "default",
    "turn .2, falling": "angle .2 falling",
    "turn .12, .5 W": "length .5",
    "falling, .5 W": "length .5, angle .2 falling",
    "ten steps, turns": "ten steps .12, then turns",
    "step .09, cap 1": "step .09, cap 1",
    "step .15, cap 1": "step .15, cap 1",
    "step .2, cap 1": "step .2, cap 1",
    "step .09, cap .74": "step .09, cap .74 (former default)",
}


STORED = study.read_rows(study.FILE)


def stored(table, label):
    """The stored rows of a set-up."""
    asked = {"setup": label, "count": str(study.COUNT[table])}
    return [row for row in STORED if row.items() >= asked.items()]


def able_only(rows, edit):
    """A column of rows, empty where a set's noun does not obey."""
    able = study.able_edits(STORED)
    return [row[edit] if edit in able[row["set"]] else "" for row in rows]


def percent(value):
    """(mean, deviation) as a cell of percents, a dash for nothing."""
    return study.show(value and tuple(part and 100 * part for part in value), 0) or "–"


def forms_table():
    """The cells of results/forms.csv, from the study's rows."""
    head = ["form of the step", "held-out loss", "CLIP-I", "*the one*, %", "blue scarf, %", "red, %"]
    lines, settings = [[*head, "obedience, %"]], study.summary(STORED, "settings")
    for title, label in FORMS.items():
        rows, means = stored("settings", label), settings[label]
        assert len(rows) == 30, label  # ten sets, three seeds
        cells = [study.show(means["loss"], 4), study.show(means["to held-out"], 3), percent(means["the one"])]
        cells += [percent(study.spread(rows, able_only(rows, edit))) for edit in ("scarf", "red")]
        lines.append([title, *cells, percent(means["obedience"])])
    return lines


def sets_table():
    """The cells of results/sets.csv, from the study's rows."""
    words, captions = stored("settings", "default"), stored("paper", "searched caption")
    lines = [["set", "the one", "blue scarf", "red", "scene", "best caption"]]
    for name in (*sorted(study.SETS), "mean"):
        own, said = ([row for row in rows if name in (row["set"], "mean")] for rows in (words, captions))
        columns = (("the one", own), ("scarf", own), ("red", own), ("scene", own), ("the one", said))
        values = [able_only(rows, c) if c in study.EDITS else [row[c] for row in rows] for c, rows in columns]
        means = [study.spread(rows, found) for (_, rows), found in zip(columns, values)]
        lines.append([name, *(percent(mean and (mean[0], None)) for mean in means)])
    return lines


EDITIONS = {  # of the miniature: what tells the weights from others, the commit, the length W of a real word
    "ffabc99b": ("d44288f", ".35"),
    "439e1df6": ("7221be6", ".63"),
    "6844ef2a": ("6c0f9ea", ".38"),
    "9102184b": ("b213c1e", ".61"),
    "9e88ed50": ("d0d0297", "1.06"),
    "294b5278": ("94f69d5 (now)", "1.22"),
}
SIX = ("cat", "dog", "robot", "car", "mushroom", "fish")


def editions_table():
    """The cells of results/editions.csv, from the rows of six sets and seed 0."""
    rows = study.read_rows(study.FILE.with_name("editions.csv")) + STORED
    rows = [row for row in rows if row["seed"] == "0" and row["count"] == "8"]
    labels = {"default": "default", "cap": FORMS["step .09, cap .74"], "Adam": "Adam 0.005"}
    lines = [["edition", "W", *(f"{what}, {name}" for what in ("loss", "CLIP-I") for name in labels)]]
    for weights, (commit, length) in EDITIONS.items():
        cells = []
        for column, digits in (("loss", 4), ("to held-out", 3)):
            for label in labels.values():
                own = [r for r in rows if (r["weights"], r["setup"]) == (weights, label) and r["set"] in SIX]
                assert len(own) == len(SIX), (weights, label)
                cells.append(study.show(study.spread(own, [row[column] for row in own]), digits))
        lines.append([commit, length, *cells])
    return lines


TABLES = [("forms", forms_table), ("sets", sets_table), ("editions", editions_table)]


@pytest.mark.parametrize("name, build", TABLES)
def test_the_tables_of_the_bench_are_the_studys_rows(name, build):
    with open(ROOT / "tests" / "bench" / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == build()


def test_a_row_that_a_kill_has_cut_is_computed_again(tmp_path):
    file = tmp_path / "study.csv"
    study.append_row(file, row("default", 0, loss=0.16641, seconds=1))
    study.append_row(file, row("default", 1, loss=0.1, seconds=2))
    whole = file.read_text()
    for cut in (1, 2, 10):
        file.write_text(whole[:-cut])
        [kept] = study.read_rows(file)
        assert kept["seed"] == "0" and kept["loss"] == "0.1664"
        study.append_row(file, row("default", 1, loss=0.1, seconds=2))
        assert file.read_text() == whole


def test_quick():
    """A few set-ups of both tables, from the photos to the tables."""
    command = [sys.executable, "-m", "notebooks.study", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = {name: dict(zip(study.TABLED, rest)) for _, name, _, *rest in lines}
    assert float(cells["default"]["the one"]) >= 0.5 and float(cells["default"]["loss"]) < 0.2
    assert float(cells["training pictures"]["the one"]) == 1
    assert float(cells[study.NOUN]["the one"]) == 0
