"""A sweep by any metric: the best value is the lowest or the highest, as the metric says."""

import pytest

from minitransformer.analysis.search_space import Values
from minitransformer.analysis.sweep import SweepFolder
from minitransformer.analysis.sweep_plan import SweepPlan
from minitransformer.analysis.sweep_report import best_seed, conclusion
from minitransformer.commands import sweep as command
from tests.runs_for_tests import configured as tiny
from tests.sweeping_for_tests import SMALL, refused, results

pytestmark = [pytest.mark.unchecked_shapes, pytest.mark.usefixtures("short_text", "in_process")]


@pytest.mark.parametrize(("metric", "order"), [("accuracy", [0.3, 0.2, 0.1]), ("perplexity", [0.1, 0.2, 0.3])])
def test_the_best_value_is_the_one_that_the_direction_of_the_metric_says(here, metric, order):
    values = (0.2, 0.3, 1.0, 0.1)
    plan = SweepPlan(
        "tiny", tiny(data="my.txt", device="cpu", steps=2), (Values("lr", values),), seeds=(5, 6), metric=metric
    )
    (here / "s").mkdir()
    search = SweepFolder(here / "s", plan)
    for lr in values:
        for seed in plan.seeds:
            value, finite = lr - 1e-3 * (seed == 6), lr < 1
            search.store.add({"lr": lr, "seed": seed, "until": 2}, {"finite": finite, metric: value}, 1.0)
    standings = search.standings(1)
    assert [standing.combination["lr"] for standing in standings] == [*order, 1.0]
    assert standings[-1].diverged == (5, 6)
    assert best_seed(plan, standings[0]) == (5 if metric == "accuracy" else 6)
    assert conclusion(search).pairs.rows[0][0] == f"lr {order[0]:g} − lr {order[1]:g}"


def test_a_sweep_for_a_metric_that_is_better_higher_names_the_highest(here, in_process, capsys):
    arguments = ["bert-mini", "--set", "lr=1e-6,1e-1", "--metric", "accuracy", "--data", "my.txt", "--steps", "2"]
    assert command.main([*arguments, *SMALL, "--out", "s"]) == 0
    out = capsys.readouterr().out
    found = {record["task"]["lr"]: record["measured"]["accuracy"] for record in results(here / "s")}
    assert f"highest    lr {max(found, key=found.__getitem__):g}: accuracy " in out
    assert "Maximised: the final accuracy" in (here / "s/report.html").read_text()


def test_results_without_the_metric_are_not_compared_by_it(here, in_process, capsys):
    arguments = ["gpt-nano", "--set", "lr=1e-3,1e-1", "--out", "s", "--data", "my.txt", "--steps", "2", *SMALL]
    assert command.main(arguments) == 0
    error = refused(capsys, *arguments, "--metric", "tokens_per_second")
    assert "s has results without tokens_per_second: choose another --out" in error
