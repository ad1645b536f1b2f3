"""Plots: what is drawn is what was measured, and files are complete and reproducible."""

import re

import pytest
from matplotlib.colors import to_hex

from offline.errors import InputError
from offline.plot_points import MEASURES, highlighted_sets, number
from offline.plot_style import LESS, LINES, MORE, SURFACE, layers_text, rendered
from offline.plots import dose_response, heat_map, save
from tests.offline.results import sweep


def lines(axes, label):
    """The coordinates of every line with more than one point."""
    assert label in axes.get_ylabel()
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines]


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_measure_has_a_panel_with_its_points():
    figure = dose_response(sweep("d"))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        MEASURES[name] for name in ("accuracy", "margin", "controls", "perplexity")
    ]
    accuracy = lines(figure.axes[0], "accuracy")
    assert [(0.1, 0.5), (0.2, 0.6000000000000001), (0.4, 0.8)] in accuracy
    assert [(0, 0.4), (1, 0.4)] in accuracy  # the base, from edge to edge
    assert [(0.2, 0.6000000000000001)] in accuracy  # the star
    assert [(0, 0.85), (1, 0.85)] in lines(figure.axes[2], "controls")
    assert [(0, 9 * 1.03), (1, 9 * 1.03)] in lines(figure.axes[3], "perplexity")
    assert {"layer 0", "layers 1-2", "chosen", "limit", "breaks a limit (hollow)"} <= set(
        texts(figure)
    )


def test_points_that_break_a_limit_are_hollow():
    axes = dose_response(sweep("d")).axes[0]
    marks = [line for line in axes.lines if line.get_linestyle() == "None"]
    hollow = [line for line in marks if to_hex(line.get_markerfacecolor()) == SURFACE]
    assert {x for line in hollow for x in line.get_xdata()} == {0.4}
    filled = [line for line in marks if to_hex(line.get_markerfacecolor()) in LINES]
    assert {x for line in filled for x in line.get_xdata()} == {0.1, 0.2}


def test_what_was_not_measured_has_no_panel():
    document = sweep("d")
    for point in [document["base"], *document["points"]]:
        point["controls"] = point["perplexity"] = None
    document |= {"chosen": None, "limits": {"min_controls": None}}
    figure = dose_response(document)
    assert len(figure.axes) == 2 and "chosen" not in texts(figure)


def test_the_heat_map_holds_every_number_in_its_cell():
    document = sweep("d")
    document["points"][0]["accuracy"] = 0.1
    figure = heat_map(document)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "2", "1-2"]
    cells = {(text.get_position()): text.get_text() for text in axes.texts}
    assert len(cells) == 9 and cells[0, 0] == ".10" and cells[2, 2] == ".80"
    whole = [patch for patch in axes.patches if patch.get_width() == 1]
    colours = {patch.get_xy(): to_hex(patch.get_facecolor()) for patch in whole}
    assert colours[-0.5, -0.5] in LESS and colours[1.5, 1.5] == MORE[-1]
    hatched = [patch.get_xy()[0] for patch in axes.patches if patch.get_hatch()]
    assert hatched == [1.5] * 3
    (frame,) = [patch for patch in axes.patches if patch.get_width() != 1]
    assert frame.get_x() == pytest.approx(1 - 0.46) and frame.get_y() == pytest.approx(2 - 0.46)


def test_one_panel_per_vector_and_positions():
    document = sweep("d", "$x_1$" * 20, ("all", "generation"))
    for plot in (dose_response, heat_map):
        titles = [axes.get_title(loc="left") for axes in plot(document).axes]
        assert [t for t in titles if t] == [
            "$x_1$$x_1$$x_1$$x_1$$x_…, all positions",
            "$x_1$$x_1$$x_1$$x_1$$x_…, generation only",
        ]


def test_of_many_layer_sets_the_best_have_colours():
    document = sweep("d")
    extra = [{**document["points"][0], "layers": [n], "accuracy": n / 100} for n in range(3, 20)]
    document["points"] += extra
    sets = highlighted_sets(document)
    assert len(sets) == len(LINES) and {(0,), (2,), (1, 2)} <= set(sets) and (19,) in sets
    assert "14 other layer sets" in texts(dose_response(document))


def test_saved_files_are_reproducible(tmp_path):
    for name in ("a.svg", "b.svg"):
        save(heat_map(sweep("d", "a <b> $c")), tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text() and "<dc:date>" not in svg
    assert "a &lt;b&gt; $c" in svg and not re.search("<b>", svg)
    save(dose_response(sweep("d")), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg", "c.png"]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
        save(heat_map(sweep("d")), tmp_path / "x.pdf")
    for plot in (dose_response, heat_map):
        with pytest.raises(InputError, match="holds no points"):
            plot({**sweep("d"), "points": []})


def test_texts():
    assert layers_text([7, 1, 2, 3]) == "1-3, 7" and layers_text([5]) == "5"
    assert [number(x) for x in (0.874, 1, -0.349, 0.996, 12.34, 0)] == [
        ".87", "1.00", "-.35", "1.00", "12.3", ".00",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [(9.0, 9.5, 10.0), (9.0, 120.0, 1e6), (9.0, 20.0, 80.0)])
def test_powers_of_ten_are_numbers(values):
    """Perplexities far apart are drawn on a logarithmic axis."""
    document = sweep("d")
    for point, value in zip(document["points"], values * 3, strict=True):
        point["perplexity"] = value
    for plot in (dose_response, heat_map):
        svg = rendered(plot(document), "svg").decode()
        assert "mathdefault" not in svg and "10^" not in svg
    ticks = re.findall(r">(10|100|1000)</text>", rendered(dose_response(document), "svg").decode())
    assert bool(ticks) == (max(values) > 5 * min(values))
