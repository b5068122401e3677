"""What the plot shows: a curve for each method and protection, stock as a band, reservations."""

import pytest

from rkv_vllm.eval.plot import draw, make_figure
from rkv_vllm.eval.report import make_document
from tests.eval.results import STOCK, forced_line, lines_of, new_plan, new_side, run_line

pytest.importorskip("matplotlib")

CARD = {"model": "folder/of/model"}
NAMES = ("rkv", "snapkv", "keydiff", "knorm", "recent", "random", "vase", "triattention")
NAMES += ("rkv[center=true]",)
SIDES = (
    STOCK,
    *(new_side(n, b, p) for n in NAMES for p in ("none", "prompt") for b in (256, 128)),
)


def document_of(sides=SIDES, is_forced=True, **changes):
    plan = new_plan(sides, num_problems=6, is_forced=is_forced)
    chances = {side: 0.9 - 0.3 * (side.budget is not None) for side in sides}
    lines = [line | changes for line in lines_of(plan, chances)]
    if is_forced:
        lines += [forced_line(side, each.problem.id) for side in sides for each in plan.asked]
    return make_document(CARD, plan, lines)


def curves_of(axes):
    """(colour, style, marker) to budgets and values, of what has a line through it."""
    found = {}
    for container in axes.containers:
        line = container[0]
        key = (line.get_color(), line.get_linestyle(), line.get_marker())
        assert key not in found
        found[key] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def test_nine_methods_with_two_protections_are_eighteen_curves_that_differ():
    figure = make_figure(document_of())
    accuracy, kl, agreement = figure.axes
    for axes in (accuracy, kl, agreement):
        curves = curves_of(axes)
        assert len(curves) == 18
        assert len({(colour, marker) for colour, _, marker in curves}) == 9
        for budgets, values in curves.values():
            # From the smaller budget to the larger, whatever the order of the sides.
            assert budgets == pytest.approx([128, 256], rel=0.1)
            assert len(values) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0].startswith("stock vLLM")
    assert legend[1:] == [*NAMES, "protected: none", "protected: prompt"]


def test_values_are_those_of_the_document():
    document = document_of((STOCK, new_side("rkv", 128), new_side("rkv", 256)))
    accuracy, kl, agreement = make_figure(document).axes
    (result,) = document["results"]
    sides = {side["side"]: side for side in result["sides"]}
    ((_, values),) = curves_of(accuracy).values()
    assert values == [100 * sides[name]["accuracy"]["mean"] for name in ("rkv 128", "rkv 256")]
    (stock,) = [line for line in accuracy.lines if len(set(line.get_ydata())) == 1 and
                line.get_color() == "#d55e00"]  # fmt: skip
    assert stock.get_ydata()[0] == 100 * sides["stock"]["accuracy"]["mean"]
    (band,) = accuracy.patches
    assert band.get_y() == pytest.approx(100 * sides["stock"]["accuracy"]["low"])
    assert band.get_y() + band.get_height() == pytest.approx(
        100 * sides["stock"]["accuracy"]["high"]
    )
    assert next(iter(curves_of(kl).values()))[1] == pytest.approx([0.2, 0.2])
    assert next(iter(curves_of(agreement).values()))[1] == pytest.approx([90, 90])


def test_no_panels_for_what_was_not_measured():
    (axes,) = make_figure(document_of(is_forced=False)).axes
    assert axes.get_ylabel().startswith("accuracy")
    plan = new_plan((STOCK, new_side("rkv", 128)), num_problems=2, is_free=False, is_forced=True)
    lines = [run_line(STOCK, "p0"), *(forced_line(side, "p0") for side in plan.sides)]
    figure = make_figure(make_document(CARD, plan, lines))
    assert [axes.get_ylabel()[:2] for axes in figure.axes] == ["KL", "to"]


def test_reservations_stand_in_the_title():
    document = document_of((STOCK, new_side("rkv", 128)), is_forced=False, compactions=0)
    (axes,) = make_figure(document).axes
    assert curves_of(axes) == {}
    title = axes.get_title(loc="left").replace("\n", " ")
    assert title.startswith("made-up: 6 problems rkv 128: 0 compactions in 6 requests")
    assert "no compressed side has numbers" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("document", [document_of(), make_document(CARD, new_plan(), [])])
def test_the_plot_is_written(tmp_path, document):
    draw(tmp_path / "plot.png", document)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
