"""Bytes, seconds and counts as readable text."""


def count_text(count: int, noun: str, plural: str | None = None) -> str:
    """Format a number of things: `1 seed`, `1,347 images`, `2 processes`; the default plural adds an s."""
    name = noun if count == 1 else plural or f"{noun}s"
    return f"{count:,} {name}"


def size_text(count: float) -> str:
    """Format a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration_text(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
