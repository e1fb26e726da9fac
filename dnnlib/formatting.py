"""Numbers for people."""


def format_duration(seconds: int | float) -> str:
    """`42s`, `3m 07s`, `2h 05m 09s` or `4d 03h 12m`."""
    total = max(int(round(seconds)), 0)
    days, hours, minutes, secs = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if total < 60:
        return f"{secs}s"
    if total < 3600:
        return f"{minutes}m {secs:02d}s"
    if total < 86400:
        return f"{hours}h {minutes:02d}m {secs:02d}s"
    return f"{days}d {hours:02d}h {minutes:02d}m"


def format_count(value: int | float) -> str:
    """`812`, `1.99 M`, `2.30 G`: three significant digits with a decimal prefix."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:g}"
