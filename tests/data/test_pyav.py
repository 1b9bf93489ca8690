"""What PyAV gives as a number, in any of its releases."""

from fractions import Fraction

import pytest

from rfl_jax.data.pyav import fraction


@pytest.mark.parametrize("ratio", [Fraction(30000, 1001), Fraction(16), Fraction(1, 2)])
def test_ratios_are_fractions(ratio):
    assert type(fraction(ratio, unknown=Fraction(1))) is Fraction
    assert fraction(ratio, unknown=Fraction(1)) == ratio


@pytest.mark.parametrize("ratio", [None, Fraction(0)])
def test_what_a_file_does_not_tell_is_the_callers(ratio):
    assert fraction(ratio, unknown=Fraction(16, 15)) == Fraction(16, 15)


@pytest.mark.parametrize(("numbers", "expected"), [((30000, 1001), "30000/1001"), ((0, 1), "7"), ((0, 0), "7"), ((1, 0), "7")])  # fmt: skip
def test_libavs_own_ratios_are_fractions(numbers, expected):
    rational = pytest.importorskip("av.rational", reason="this PyAV has no ratios of its own")
    assert str(fraction(rational.AVRational(*numbers), unknown=Fraction(7))) == expected
