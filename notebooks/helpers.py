"""Shared by the notebooks: their look, a word learned beside others, and figures of the study's rows.

Importing this module makes the repository's packages importable from this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

from notebooks import setups, study
from tinyti.programs.sheet import draw_sheet

COLOUR = {  # of each method, text and measure, in all notebooks
    "whitened": "#c62828",
    "Adam": "#1f77b4",
    "S*": "#c62828",
    "noun": "#7f7f7f",
    "caption": "#8e44ad",
    "the one": "#c62828",
    "obedience": "#2a9d8f",
    "scene": "#b8860b",
    "to held-out": "#444444",
    "ground": "#8c564b",
}
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)


def show(rows, footer=()):
    """Draw a sheet of pictures (`draw_sheet`) in 256 colours, which takes a third of the bytes."""
    return draw_sheet(rows, footer).quantize(256, kmeans=2)


def learn(model, name, data, seed=0, **options):
    """Learn a word from a set (study.Data) as `setups.learn` does, and keep the model's other words."""
    others = {word: concept.vectors.detach() for word, concept in model.concepts.items() if word != name}
    [vectors] = setups.learn(model, data, seed, **options).values()
    setups.use(model, {**others, name: vectors})
    return vectors


def plot_study(axis, means, settings, columns=("the one", "obedience")):
    """Plot columns of `study.summary` over a setting: settings {x: label}.

    Error bars are the standard deviation of the seeds' means.  Settings without results are left out.
    """
    for column in columns:
        points = [(x, *means[label][column]) for x, label in settings.items() if means[label][column]]
        if points:
            xs, ys, deviations = zip(*points)
            errors = [deviation or 0 for deviation in deviations]
            axis.errorbar(xs, ys, errors, marker="o", ms=4, capsize=3, color=COLOUR[column], label=column)


def print_study(means, labels, columns=("the one", "obedience", "scene")):
    """Print columns of `study.summary`, a line for each set-up."""
    print(f"{'':36s}{'runs':>5s}" + "".join(f"{column:>17s}" for column in columns))
    for label in labels:
        cells = [study.show(means[label][column], 4 if column == "loss" else 2) for column in columns]
        print(f"{label:36s}{means[label]['runs']:5d}" + "".join(f"{cell:>17s}" for cell in cells))
