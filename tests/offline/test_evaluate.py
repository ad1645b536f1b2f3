"""The path of an evaluation without a server: items aligned, differences, interruption, table."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from offline.errors import InputError
from offline.evaluation.confidence import Bootstrap, Figure
from offline.evaluation.evaluate import document, measure_all
from offline.evaluation.measured import Measured, Outcome
from offline.evaluation.report import show
from offline.evaluation.target import Setting
from offline.partial import PartialRun

TARGET = SimpleNamespace(
    settings=[Setting("base", "m"), Setting("truthful", "m:truthful")], facts={"model": "m"}
)


class Given:
    """A task whose outcomes are given; counts how often it is asked."""

    side_effect = False

    def __init__(self, name, outcomes):
        self.name, self.facts, self._outcomes = name, {"limit": None}, outcomes
        self.asked = []

    def measure(self, target, setting):
        self.asked.append(setting.name)
        found = self._outcomes[setting.name]
        if isinstance(found, BaseException):
            raise found
        return found


def outcome(ids, totals, **counts):
    return Outcome({"acc": Measured(ids, Figure(totals), True)}, counts)


def run(tasks, folder, name="x"):
    with PartialRun(folder / name, {"same": 1}, restart=False) as partial:
        return measure_all(TARGET, tasks, partial)


def report(tasks, outcomes):
    return document(TARGET, tasks, outcomes, Bootstrap(), {})


def test_settings_are_compared_item_by_item_over_what_both_have(tmp_path):
    task = Given(
        "t",
        {
            "base": outcome(["a", "b", "c"], [0.0, 1.0, 1.0], unparsed=0),
            "truthful": outcome(["d", "b", "a"], [9.0, 1.5, 0.5], unparsed=1),
        },
    )
    (row,) = report([task], run([task], tmp_path))["tasks"]
    assert row["n"] == 2
    assert row["values"]["base"]["value"] == 0.5
    assert row["differences"] == {"truthful": {"value": 0.5, "low": 0.5, "high": 0.5}}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    done = Given("first", {"base": outcome(["a"], [0.25]), "truthful": outcome(["a"], [0.5])})
    late = Given("second", {"base": outcome(["a"], [1.0]), "truthful": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run([done, late], tmp_path)
    assert late.asked == ["base", "truthful"]
    again = [
        Given("first", {}),
        Given("second", {"truthful": outcome(["a"], [2.0])}),
    ]
    found = report(again, run(again, tmp_path))
    assert (again[0].asked, again[1].asked) == ([], ["truthful"])
    values = [row["differences"]["truthful"]["value"] for row in found["tasks"]]
    assert values == [0.25, 1.0]


def test_weights_and_perplexity_survive_the_disk(tmp_path):
    figure = Figure([-4.0, -9.0], [2.0, 3.0], perplexity=True)
    made = Outcome({"perplexity": Measured(["1", "2"], figure, False)}, {"cut": 3})
    assert Outcome.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_figures_without_common_items_or_numbers_are_refused(tmp_path):
    apart = Given("t", {"base": outcome(["a"], [0.0]), "truthful": outcome(["b"], [1.0])})
    with pytest.raises(InputError, match="task 't', acc: no item was measured in every setting"):
        report([apart], run([apart], tmp_path))
    broken = Given("t", {"base": outcome(["a"], [0.0]), "truthful": outcome(["a"], [float("nan")])})
    with pytest.raises(InputError, match="setting 'truthful': not all values are finite"):
        report([broken], run([broken], tmp_path, "y"))


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_table_says_better_only_where_zero_is_left_out(tmp_path, width):
    ids = [str(number) for number in range(40)]
    good = Given("good", {"base": outcome(ids, [0.0] * 40), "truthful": outcome(ids, [1.0] * 40)})
    bad = Given("bad", {"base": outcome(ids, [1.0] * 40), "truthful": outcome(ids, [0.0] * 40)})
    mixed = [float(number % 2) for number in range(40)]
    open_ = Given("open", {"base": outcome(ids, mixed), "truthful": outcome(ids, mixed[::-1])})
    tasks = [good, bad, open_]
    bad.side_effect = True
    open_.name = "a-name-" * 9
    shown = Console(width=width, record=True, file=io.StringIO())
    show(report(tasks, run(tasks, tmp_path)), shown)
    text = shown.export_text()
    # A task's rows follow its name, which may be folded.
    line = {
        name: next(line for line in text[text.index(name) :].splitlines() if "truthf" in line)
        for name in ("good", "bad", "a-na")
    }
    assert "better" in line["good"] and "worse" in line["bad"]
    assert "better" not in line["a-na"].split("]")[-1] and "worse" not in line["a-na"]
    assert text.index("Goals") < text.index("a-na") < text.index("Side effects") < text.index("bad")
    # Every figure is whole.
    assert text.count("[0.000, 0.000]") == text.count("[1.000, 1.000]") == 2
    assert text.count("[+1.000, +1.000]") == text.count("[-1.000, -1.000]") == 1
