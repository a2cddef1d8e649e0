"""A number that is shown twice is the same number, and counts are grammatical."""

from decimal import ROUND_HALF_EVEN, Decimal

import pytest

from q3q.export.measured import Measured
from q3q.formatting import (
    bytes_in_words,
    changes,
    fixed,
    percent,
    plural,
    printable,
    significant,
    with_spread,
)
from q3q.record import COMPLETED, TrialRecord
from q3q.report.tables import result_tables
from q3q.sweep.progress import headline
from tests.specs import evaluation_of, make_spec


def test_percent_rounds_the_decimal_half_to_even() -> None:
    """Each share ends in 5 at the place that is cut, as means of four tasks do."""
    for thousandths in range(0, 1000, 7):
        exact = Decimal(thousandths) / 1000 + Decimal("0.0005")
        expected = (100 * exact).quantize(Decimal("0.1"), rounding=ROUND_HALF_EVEN)
        for noise in (1.0, 1 + 2**-52, 1 - 2**-53):  # the order of a sum decides its last bit
            assert percent(float(exact) * noise) == str(expected)


@pytest.mark.parametrize("scores", [(0.5075,), (0.49, 0.525), (0.5, 0.51, 0.515, 0.505), (0.125,)])
def test_progress_tables_and_cards_show_the_same_numbers(scores: tuple[float, ...]) -> None:
    tasks = [f"task{number}" for number in range(len(scores))]
    evaluation = evaluation_of("stories", tasks=tasks)
    metrics = {f"{task}/acc": score for task, score in zip(tasks, scores, strict=True)}
    record = TrialRecord(
        spec=make_spec("rtn", 4, evaluation=evaluation),
        status=COMPLETED,
        metrics={"perplexity/stories": 3.5005, "bits_per_weight": 4.125, **metrics},
    )
    perplexity, accuracy = (table.rows[0][1] for table in result_tables([record], everything=False))
    words = " ".join(headline(record))
    assert f"stories {perplexity}," in f"{words},".replace(" accuracy", ",")
    assert f"accuracy {accuracy} %" in words
    card = "\n".join(Measured(metrics=record.metrics).lines())
    assert f"| perplexity, stories | {perplexity} |" in card
    assert len(scores) > 1 or f"| accuracy of task0, % | {accuracy} |" in card


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (3.5, 4, "3.500"),
        (9.99996, 4, "10.00"),
        (999.96, 4, "1000"),
        (123456.0, 4, "1.23e+05"),
        (0.00091, 2, "9.1e-04"),
        (0.0, 4, "0.0"),
        (1.4142, 2, "1.4"),
        (987.0, 2, "990"),
    ],
)
def test_significant_digits_are_as_many_as_asked_for(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


@pytest.mark.parametrize(
    ("mean", "spread", "shown"),
    [
        (1.74, 0.00091, ("1.74000", "0.00091")),
        (12.1, 0.1, ("12.10", "0.10")),
        (51.0, 1.4142, ("51.0", "1.4")),
        (51234.0, 1234.0, ("51200", "1200")),
        (3.0, 0.0, ("3.000", "0")),
    ],
)
def test_a_mean_has_the_digits_that_its_deviation_supports(
    mean: float, spread: float, shown: tuple[str, str]
) -> None:
    assert with_spread(mean, spread) == shown


def test_zero_has_no_sign_and_an_interval_has_the_decimals_of_its_value() -> None:
    assert fixed(-0.04, 1) == "0.0"
    assert changes(-0.00000001, -0.1, 0.1) == ("0.0", "-10.0", "+10.0")
    assert changes(12.345, 12.0, 12.7) == ("+1,234", "+1,200", "+1,270")
    assert changes(1e9) == ("+1.00e+11",)


def test_bytes_have_three_digits_in_the_unit_that_shows_them() -> None:
    shown = {
        512: "512 B",
        999.5e3: "1.00 MB",
        6.7e6: "6.70 MB",
        203.4e6: "203 MB",
        25e12: "25.0 TB",
    }
    assert {count: bytes_in_words(count) for count in shown} == shown


def test_one_is_singular_and_no_control_character_is_printed() -> None:
    assert [plural(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert printable("a\x1b[31mb\n\tc\u202ed") == "a [31mb c d"
