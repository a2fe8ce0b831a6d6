"""Figures are pictures whose curves can be told apart; pages are whole, escaped and alone."""

import io
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.reporting import figures, plain
from minitransformer.reporting.figures import Curve, png
from minitransformer.reporting.pages import HINT, Link, Page
from minitransformer.reporting.tables import cell_text, number_columns, number_text

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Reads a page as a browser would: tags must close in order; what they hold is text again."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def some(n: int, points: int = 20) -> list[Curve]:
    x = np.arange(1, points + 1)
    return [Curve(f"curve {i}", x, i + 1 / x, i + 0.9 / x, i + 1.1 / x) for i in range(n)]


def draw(n: int, **choices):
    return figures.curves(some(n), x_label="steps", y_label="loss", title="A title", **choices)


def pixels(figure) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png(figure)))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 15])
def test_a_legend_never_overlaps_the_axes(n):
    figure = draw(n)
    png(figure)
    (axes,) = figure.axes
    legends = [*figure.legends, *([axes.get_legend()] if axes.get_legend() else [])]
    assert len(legends) == (n > 1)
    for legend in legends:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert figure.bbox.padded(1).contains(*legend.get_window_extent().min)
        assert figure.bbox.padded(1).contains(*legend.get_window_extent().max)


def test_thirty_curves_differ_pairwise_in_colour_or_style_and_neighbours_also_in_grey():
    lines = draw(30).axes[0].lines
    looks = [(line.get_color(), str(line.get_linestyle()), line._dash_pattern, line.get_marker()) for line in lines]
    assert len({str(look) for look in looks}) == 30
    for one, other in pairwise(looks):
        assert one[2] != other[2]
        assert one[3] != other[3]


def test_a_label_that_begins_with_an_underscore_is_in_the_legend():
    curves = [Curve("_hidden", [1, 2], [1, 2]), Curve("shown", [1, 2], [2, 1])]
    figure = figures.curves(curves, x_label="x", y_label="y", title="")
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_hidden", "shown"]


def test_a_curve_with_gaps_and_an_unknown_band_is_drawn():
    gaps = Curve("diverged", [1, 2, 3], [1.0, np.nan, np.inf], [0.5, np.nan, -np.inf], [1.5, np.nan, np.inf])
    assert pixels(figures.curves([gaps], x_label="x", y_label="y", title="", log_y=True)).size


def test_a_logarithmic_axis_of_sizes_has_these_sizes_as_ticks():
    curve = Curve("width", [16, 32, 64, 128], [4, 3, 2, 1])
    axes = figures.curves([curve], x_label="width", y_label="loss", title="", log_x=True).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "32", "64", "128"]


@pytest.mark.parametrize("layers", [2, 3, 6, 24])
def test_layers_have_whole_numbers_as_ticks(layers):
    figure = figures.curves([Curve("a", range(1, layers + 1), [1.0] * layers)], x_label="layer", y_label="", title="")
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_a_heatmap_writes_every_number_into_its_cell():
    values = np.array([[1.5, -2.25, np.nan], [3e-5, 0.0, 7.0]])
    figure = figures.heatmap(values, rows=["a", "b"], columns=["c", "d", "e"], title="", value_label="ratio")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.5", "−2.25", "–", "3e−05", "0", "7"]
    assert pixels(figure).size


def test_a_map_of_one_value_is_drawn():
    for values in ([[0.0]], [[np.nan]]):
        assert pixels(figures.heatmap(values, rows=["a"], columns=["b"], title="", value_label="")).size


def test_intervals_that_cover_the_reference_are_hollow():
    figure = figures.intervals(
        ["below", "covers", "unknown"],
        [-1, 0.5, 3],
        [-2, -1, -np.inf],
        [-0.5, 2, np.inf],
        x_label="difference",
        title="",
        reference=0,
    )
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert faces == [figures.PALETTE[0], "white", "white"]


def test_figures_leave_no_global_state():
    before = sys.modules.get("matplotlib.pyplot")
    png(draw(3))
    assert sys.modules.get("matplotlib.pyplot") is before


def test_a_figure_is_the_same_picture_every_time():
    assert png(draw(3)) == png(draw(3))


def test_without_matplotlib_the_remedy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lab\]"'):
        draw(1)


def whole_page() -> Page:
    page = Page("A <page> & more")
    page.heading("Results")
    page.paragraph("x < y & z")
    page.table(["name", "loss"], [["<b>", 1.5], ["pre", None]])
    page.figure(png(draw(2)), 'caption "quoted"', 'alt "quoted" <x>')
    page.code("python train.py <file> && echo 'done'")
    return page


def test_a_page_is_one_file_without_a_script_that_loads_no_other():
    html = whole_page().html()
    reader = Reader(html)
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert "<script" not in html
    assert not re.search(r"https?://|@import|url\(", html)


def test_papers_that_are_named_become_links_and_numbers_do_not():
    page = Page("t")
    page.paragraph("After arXiv 2304.14802, 2412.13795 and 2503.04598: 1234.56789 <nats>; Vaswani (arXiv 1706.03762).")
    page.table(["claim"], [["LNS (arXiv 2502.05795)"]])
    html = page.html()
    numbers = "2304.14802", "2412.13795", "2503.04598", "1706.03762", "2502.05795"
    assert Reader(html).references == [f"https://arxiv.org/abs/{number}" for number in numbers]
    assert "1234.56789 &lt;nats&gt;" in html


def test_a_link_leads_to_a_file_beside_the_page_whatever_it_is_called():
    page = Page("t")
    page.links("With all digits:", [Link("a <b>.csv", 'a "b" c#.csv')])
    page.table(["run"], [[Link("run", "trials/run/")]])
    assert Reader(page.html()).references == ["a%20%22b%22%20c%23.csv", "trials/run/"]


def test_a_page_reads_on_phones_in_the_dark_and_on_paper():
    html = whole_page().html()
    for wish in ('name="viewport"', "prefers-color-scheme: dark", "@media print", '<html lang="en">'):
        assert wish in html


def test_a_table_with_long_texts_is_a_card_for_each_row_on_a_phone_and_names_its_columns():
    page = Page("t")
    page.table(["outcome", "claim"], [["passed", "a claim " * 9]])
    html = page.html()
    assert "class=cards" in html
    assert 'data-column="outcome">passed' in html
    assert HINT not in html


@pytest.mark.parametrize(("columns", "hint"), [(2, None), (9, "hint"), (30, "hint always")])
def test_a_table_that_is_wider_than_the_window_says_that_it_scrolls(columns, hint):
    page = Page("t")
    page.table([f"column {i}" for i in range(columns)], [range(columns)])
    assert re.findall(r'<p class="([^"]*)">', page.html()) == [hint] * bool(hint)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_any_text_comes_out_of_a_table_as_it_went_in(rows):
    page = Page("t")
    page.table(["a", "b"], rows)
    cells = Reader(page.html()).cells[2:]
    # A browser reads every line ending as a line feed.
    flat = [cell.replace("\r\n", "\n").replace("\r", "\n") for row in rows for cell in row]
    assert [cell.replace("\r\n", "\n").replace("\r", "\n") for cell in cells] == flat


def test_cells_of_a_table_read_well():
    values = [
        None,
        True,
        False,
        3,
        0.123456,
        12345.678,
        1e-7,
        2.5e9,
        0.0,
        float("nan"),
        np.float32(0.5),
        np.bool_(True),
    ]
    shown = ["–", "yes", "no", "3", "0.1235", "12350", "1.000e-07", "2.500e+09", "0", "nan", "0.5000", "yes"]
    assert [cell_text(value) for value in values] == shown


@given(st.floats(-1e300, 1e300))
def test_the_text_of_a_number_is_right_to_four_digits(value):
    assert float(number_text(value)) == pytest.approx(value, rel=5.1e-4, abs=1e-300)


def test_columns_of_numbers_stand_at_the_right():
    rows = [["a", 1, None, "1.2 ± 0.3", True], ["b", None, None, "<0.001", False]]
    assert number_columns(list("vwxyz"), rows) == [False, True, False, True, False]


@given(st.integers(40, 120), st.lists(st.tuples(st.text(), st.floats(), st.text(max_size=20)), max_size=5))
def test_a_table_in_letters_keeps_to_its_width(width, rows):
    for line in plain.plain_table(["name", "a number", "some text"], rows, width).splitlines():
        assert len(line) <= width


def test_columns_without_room_follow_below_with_the_first_one_repeated():
    text = plain.plain_table(["name", *(f"column {i}" for i in range(9))], [["row", *range(9)]], 40)
    assert len(text.split("\n\n")) > 1
    assert all(block.startswith("name") for block in text.split("\n\n"))
    assert all(f"column {i}" in text for i in range(9))


@given(st.integers(1, 4), st.integers(40, 120))
def test_a_plot_in_letters_shows_every_curve_within_its_width(n, width):
    text = plain.plot(some(n), x_label="steps", y_label="loss", width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert all(sum(mark in line for line in text.splitlines()) >= 2 for mark in plain.MARKS[:n])


def test_curves_on_top_of_each_other_show_in_turn():
    same = [Curve("a", [0, 1], [1, 2]), Curve("b", [0, 1], [1, 2])]
    drawing = plain.plot(same, x_label="x", y_label="y").split("+-")[0]
    assert drawing.count("o") > 20
    assert drawing.count("x") > 20


@pytest.mark.parametrize("mean", [[], [1.0], [np.nan, np.nan]])
def test_what_has_no_two_points_has_no_plot(mean):
    assert plain.plot([Curve("a", range(len(mean)), mean)], x_label="x", y_label="y") == ""


def test_a_level_curve_has_a_plot():
    assert "o" in plain.plot([Curve("level", [0, 1], [2.0, 2.0])], x_label="x", y_label="z").split("+-")[0]
