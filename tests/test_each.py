"""The `each` decorator: it reports every failing case by name and is as strict as one test per case."""

import os

import pytest
from each import diagonal, each, product, rest_slow


def failures(test, **fixtures):
    with pytest.raises(BaseException) as error:  # noqa: PT011 (any error that the test raises)
        test(**fixtures)
    found = getattr(error.value, "exceptions", [error.value])
    return [(type(one).__name__, one.__notes__[0]) for one in found]


def test_every_failing_case_is_named_and_the_others_still_run():
    seen = []

    @each("word, number", [("a", 1), ("b", 2), ("c", 3), ("d", 4)])
    def test(number, word):
        seen.append(word)
        assert number != 2
        if number == 3:
            pytest.fail("a failure raised by pytest")
        with pytest.raises(KeyError):
            {}["x" if number == 4 else "y"]

    assert failures(test) == [
        ("AssertionError", "in case 1 of 4: word='b', number=2"),
        ("Failed", "in case 2 of 4: word='c', number=3"),
    ]
    assert seen == list("abcd")


def test_a_single_failure_is_raised_unchanged_and_nested_loops_name_both_cases():
    @each("a", [1, 2])
    @each("b", [3, 4])
    def test(a, b):
        assert (a, b) != (2, 3)

    with pytest.raises(AssertionError) as error:
        test()
    assert error.value.__notes__ == ["in case 0 of 2: b=3", "in case 1 of 2: a=2"]


def test_each_case_gets_its_own_folder_and_restores_the_environment(tmp_path, monkeypatch):
    @each("name", ["x", "y"])
    def test(name, tmp_path, monkeypatch):
        assert list(tmp_path.iterdir()) == []
        (tmp_path / name).touch()
        assert "PRISM_EACH" not in os.environ
        monkeypatch.setenv("PRISM_EACH", name)

    test(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert "PRISM_EACH" not in os.environ
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loop_is_skipped_only_if_every_case_is():
    @each("number", [1, 2])
    def test(number, all_of_them):
        if all_of_them or number == 1:
            pytest.skip("not here")

    test(all_of_them=False)
    with pytest.raises(pytest.skip.Exception):
        test(all_of_them=True)


def test_an_empty_loop_and_an_unknown_default_are_errors():
    with pytest.raises(AssertionError, match="without cases"):
        each("x", [])
    with pytest.raises(AssertionError, match="some of them"):
        rest_slow([1, 2], [3])
    assert len(rest_slow([1, 2], [2])) == 2


def test_a_diagonal_has_every_value_and_a_product_every_combination():
    a, b = range(3), range(7)
    assert {x for x, _ in diagonal(a, b)} == set(a)
    assert {y for _, y in diagonal(a, b)} == set(b)
    assert len(diagonal(a, b)) == 7
    assert len(set(product(a, b))) == 21
