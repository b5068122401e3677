import pytest

from rkv_vllm.cli.errors import USAGE, CommandError
from rkv_vllm.cli.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 gib", 3 * 2**29),
        (".5MiB", 2**19),
        ("7", 7),
        ("7B", 7),
        ("2TiB", 2**41),
        ("123456789012345678901", 123456789012345678901),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text, num_bytes):
    assert parse_size("--x", text) == num_bytes


@pytest.mark.parametrize("text", ["", "80X", "eighty", "-1GiB", "0", "0.1B", "1e9", "nan"])
def test_nonsense_is_refused_by_name_with_the_cure(text):
    with pytest.raises(CommandError, match=r"^--x: got '.*', wanted a size .*; write it like") as e:
        parse_size("--x", text)
    assert e.value.exit_code == USAGE


def test_zero_is_a_size_where_it_makes_sense():
    assert parse_size("--x", "0", smallest=0) == 0


def test_sizes_are_printed_in_the_unit_that_suits():
    assert [format_size(n) for n in (0, 1023, 1024, 3 * 2**29)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 GiB")
    ]
