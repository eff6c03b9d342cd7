from subspec.utils.rounding import is_power_of_two, next_power_of_two, round_up


def test_multiples():
    assert [round_up(number, 64) for number in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]


def test_powers_of_two():
    assert [next_power_of_two(number) for number in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
    assert [number for number in range(-4, 9) if is_power_of_two(number)] == [1, 2, 4, 8]
