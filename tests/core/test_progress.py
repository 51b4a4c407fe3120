"""What the console shows."""

from __future__ import annotations

from rlhf_pipeline.core.progress import amount


def test_numbers_are_said_in_three_digits() -> None:
    said = [amount(number, "B") for number in (0, 864, 1234, 12_345, 123_456, 16e9, 2e12)]
    assert said == ["0 B", "864 B", "1.2 kB", "12.3 kB", "123 kB", "16.0 GB", "2.0 TB"]
    assert amount(45_300) == "45.3 k"
