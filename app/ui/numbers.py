"""How a number is written for a person: three significant digits, thin spaces, a unit, a sign on changes. Knows no screen."""

from math import floor, isfinite, log10

THIN = "\u2009"
MINUS = "\u2212"
TIMES = "\u00d7"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def amount(value: float, digits: int = 3) -> str:
    """`value` with three significant digits and thin spaces between thousands: 20.7, 134 515 -> 135 000."""
    if not isfinite(value):
        return "∞" if value > 0 else "n/a"
    if value == 0:
        return "0"
    places = digits - 1 - floor(log10(abs(value)))
    if abs(value) >= 1e9:
        mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
        return f"{MINUS if value < 0 else ''}{mantissa}{TIMES}10{_raised(exponent)}"
    rounded = round(abs(value), places)
    if 0 < rounded < 1e-4:
        mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
        text = f"{mantissa}{TIMES}10{_raised(exponent)}"
    else:
        text = f"{rounded:,.{max(places, 0)}f}".replace(",", THIN)
    return (MINUS if value < 0 else "") + text


def _raised(exponent: str) -> str:
    return str(int(exponent)).translate(RAISED)


def whole(value: int) -> str:
    """A count in full, thin spaces between thousands."""
    return f"{value:,}".replace(",", THIN)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 run, 2 runs."""
    return f"{whole(count)} {noun}{'s' * (count != 1)}"


def short_count(value: int) -> str:
    """A count of parameters in the field's short form: 2.94 M, 135 M, 1.24 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{amount(value / size)}{THIN}{unit}"
    return whole(value)


def file_size(size: float) -> str:
    """Stored bytes: kB and MB below one GiB, GiB from there."""
    if size >= 1 << 30:
        return f"{amount(size / (1 << 30))}{THIN}GiB"
    return f"{amount(size / 1e6)}{THIN}MB" if size >= 1e6 else f"{amount(size / 1e3)}{THIN}kB"


def memory(size: float) -> str:
    """Bytes of memory: MiB below a tenth of a GiB, GiB from there."""
    return f"{amount(size / (1 << 30))}{THIN}GiB" if size >= 0.1 * (1 << 30) else f"{amount(size / (1 << 20))}{THIN}MiB"


def signed_percent(change: float) -> str:
    """A relative change, such as 0.123 -> +12.3 %. Zero has no sign."""
    if not isfinite(change):
        return f"+∞{THIN}%"
    sign = "+" if change > 0 else MINUS if change < 0 else ""
    return f"{sign}{amount(abs(change) * 100)}{THIN}%"


def times(ratio: float) -> str:
    """A factor with its sign."""
    return f"{amount(ratio)}{TIMES}"


def duration(seconds: float) -> str:
    """A span of time in the largest unit that reads well: 4.2 ms, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 1:
        return f"{amount(seconds * 1000)}{THIN}ms"
    if seconds < 60:
        return f"{amount(seconds, 2)}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"
