"""Sizes for people, at the borders of their units."""

import pytest

from loractl.adapters.byte_sizes import file_size, memory_size


@pytest.mark.parametrize(
    ("num_bytes", "file", "memory"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1 kB", "1000 bytes"),
        (1024, "1.02 kB", "1 KiB"),
        (1_843_200, "1.84 MB", "1.76 MiB"),
        (999_600, "1 MB", "976 KiB"),
        (1 << 30, "1.07 GB", "1 GiB"),
        (123_456_000_000, "123 GB", "115 GiB"),
        (4_000_000_000_000, "4,000 GB", "3,725 GiB"),
        (-(3 << 20), "-3.15 MB", "-3 MiB"),
    ],
)
def test_sizes_have_three_digits_and_their_unit(num_bytes: int, file: str, memory: str) -> None:
    assert (file_size(num_bytes), memory_size(num_bytes)) == (file, memory)
