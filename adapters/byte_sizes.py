"""Sizes as people read them: files in powers of 1000, memory in powers of 1024, three digits each."""


def file_size(num_bytes: float) -> str:
    """Give a file's size, as disks and downloads are counted: `1.84 MB`."""
    return _scaled(num_bytes, 1000, ("bytes", "kB", "MB", "GB"))


def memory_size(num_bytes: float) -> str:
    """Give an amount of memory, as its limits are counted: `1.52 GiB`; below zero where more is taken than there is."""
    return _scaled(num_bytes, 1024, ("bytes", "KiB", "MiB", "GiB"))


def _scaled(num_bytes: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # What rounds to the next unit's one is told in that unit.
        if abs(num_bytes) < step - 0.5:
            return f"{num_bytes:.0f} {unit}" if abs(num_bytes) >= 100 or unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= step
    return f"{num_bytes:,.0f} {units[-1]}" if abs(num_bytes) >= 100 else f"{num_bytes:.3g} {units[-1]}"
