"""Format numbers, counts and names for people: every screen, table and note uses these functions.

A number that is shown in two places is rounded once, here. It is rounded as a decimal, half to
even: 0.5075 is 50.8 %, although the binary number nearest to 0.5075 lies below it.
"""

import math
from decimal import ROUND_HALF_EVEN, Decimal

EXACT_DIGITS = 12  # the last bits of a float, which depend on the order of a sum, do not count
SMALL, LARGE = 1e-3, 1e4  # numbers outside are written with an exponent
FEWEST_DECIMALS, MOST_DECIMALS = 1, 4  # of a change below 100 %
THOUSANDS = 1e9  # a change is written with an exponent from here on, in percent


def fixed(value: float, decimals: int) -> str:
    """Return `value` with this many decimals; negative ones round to tens, hundreds ..."""
    exact = Decimal(f"{value:.{EXACT_DIGITS}g}")
    rounded = exact.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_EVEN)
    text = f"{rounded:f}"
    return text.lstrip("-") if not rounded else text


def percent(share: float, decimals: int = 1) -> str:
    """Return a share in percent, without the sign: 0.5075 is `50.8`."""
    return fixed(100 * share, decimals)


def significant(value: float, digits: int = 4) -> str:
    """Return `value` to this many digits, with trailing zeros: `3.500`, `1.23e+05`, `0.0`."""
    if value == 0:
        return "0.0"
    if not SMALL <= abs(value) < LARGE:
        return f"{value:.{max(1, digits - 2)}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    text = fixed(value, decimals)
    # 9.9996 has become 10.0000: one digit too many.
    grown = math.floor(math.log10(abs(float(text)))) > digits - 1 - decimals
    return fixed(value, decimals - 1) if grown and decimals > 0 else text


def decimals_of(spread: float) -> int:
    """Return the decimals that show two digits of a spread: 1 of 1.4, 5 of 0.00091."""
    exponent = f"{abs(spread):.1e}".partition("e")[2]  # of the rounded spread: 0.0999 is 0.10
    return 1 - int(exponent)


def with_spread(mean: float, spread: float) -> tuple[str, str]:
    """Return a mean and its standard deviation, both to two digits of the deviation."""
    if spread == 0 or not math.isfinite(spread):
        return significant(mean), significant(spread, 2) if spread else "0"
    decimals = decimals_of(spread)
    return fixed(mean, decimals), fixed(spread, decimals)


def changes(*values: float) -> tuple[str, ...]:
    """Format a change and the ends of its interval, all in percent or points, with their signs.

    All have the same decimals: two digits of the interval's reach, or of the change where it has no
    interval. Zero has no sign.

    Args:
        values: the change; then, if there is an interval, its two ends. Of 1: 0.2 is `+20.0`.
    """
    value, *ends = values
    reach = 100 * max((abs(end - value) for end in ends), default=abs(value))
    fewest = FEWEST_DECIMALS if max(map(abs, values)) < 1 else 0
    decimals = min(MOST_DECIMALS, max(fewest, decimals_of(reach))) if reach > 0 else fewest
    return tuple(signed(100 * number, decimals) for number in values)


def plural(count: int, noun: str) -> str:
    """Return `1 trial` or `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Return one line without control characters, which a name or an error may hold."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def signed(value: float, decimals: int = 1) -> str:
    """Return a number with its sign and commas between thousands; zero has no sign."""
    if abs(value) >= THOUSANDS:
        return f"{value:+.2e}"
    text = fixed(value, decimals)
    whole, point, rest = text.lstrip("-").partition(".")
    sign = "" if not float(text) else "-" if text.startswith("-") else "+"
    return f"{sign}{int(whole):,}{point}{rest}"


def bytes_in_words(count: float) -> str:
    """Return `512 B`, `1.50 KB`, `203 MB`."""
    units = ["TB", "GB", "MB", "KB", "B"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop()
    return f"{fixed(count, 0) if units[-1] == 'B' else significant(count, 3)} {units[-1]}"


def in_gb(count: float) -> str:
    """Return bytes as one gives `memory=`: `2.5 GB`."""
    return f"{fixed(count / 1e9, 1)} GB"


def enough_gb(count: float) -> str:
    """Return bytes as `in_gb` does, rounded up: a `memory=` that is enough."""
    return in_gb(math.ceil(count / 1e8) * 1e8)


def duration(seconds: float, tenths: bool = False) -> str:
    """Return `4 s` (with tenths `4.2 s`), `42 s`, `3 min 10 s` or `2 h 05 min`."""
    if tenths and seconds < 10:
        return f"{fixed(seconds, 1)} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02} min"


def in_one_unit(seconds: float) -> str:
    """Return a predicted duration in one unit: `42 s`, `12 min`, `2.1 h`."""
    if seconds < 90:
        return f"{fixed(seconds, 0)} s"
    return f"{fixed(seconds / 60, 0)} min" if seconds < 5400 else f"{fixed(seconds / 3600, 1)} h"
