"""Many cases in one test: `@each("text", TEXTS)` instead of `pytest.mark.parametrize("text", TEXTS)`."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence

import pytest

FAILURES = (Exception, pytest.fail.Exception)
SOME, ALL = "some", "all"


def each(names: str, cases: Iterable[object], *, some: Iterable[object] | None = None) -> Callable[[Callable], Callable]:
    """Call the test once per case. Every failing case is named, and the remaining cases still run.

    With `some`, the default run uses only those cases, and the slow run uses all of them. Each case gets a new `tmp_path`,
    and the changes of a `monkeypatch` are undone after each case. All cases share the other fixtures.
    """
    keys = [name.strip() for name in names.split(",")]
    chosen = {ALL: list(cases)} | ({} if some is None else {SOME: list(some)})
    assert all(chosen.values()), "a loop without cases tests nothing"

    def decorate(test: Callable) -> Callable:
        signature = inspect.signature(test)
        assert set(keys) <= set(signature.parameters), keys
        left = [value for key, value in signature.parameters.items() if key not in keys]
        extra = inspect.Parameter("which_cases", inspect.Parameter.KEYWORD_ONLY)

        @functools.wraps(test)
        def loop(*, which_cases: str = ALL, **fixtures: object) -> None:
            run(test, keys, chosen[which_cases], fixtures)

        loop.__signature__ = signature.replace(parameters=left if some is None else [*left, extra])
        if some is None:
            return loop
        return pytest.mark.parametrize("which_cases", [SOME, pytest.param(ALL, marks=pytest.mark.slow)])(loop)

    return decorate


def run(test: Callable, keys: list[str], cases: list[object], fixtures: dict[str, object]) -> None:
    """Run the test with each case, and raise the failures."""
    failed, skipped = [], 0
    for number, case in enumerate(cases):
        values = dict(zip(keys, [case] if len(keys) == 1 else case, strict=True))
        own = dict(fixtures)
        if "tmp_path" in own:
            own["tmp_path"] = fixtures["tmp_path"] / f"case-{number}"
            own["tmp_path"].mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if "monkeypatch" in own:
                own["monkeypatch"] = patch
            try:
                test(**own, **values)
            except pytest.skip.Exception:
                skipped += 1
            except FAILURES as error:
                told = ", ".join(f"{key}={value!r:.300}" for key, value in values.items())
                error.add_note(f"in case {number} of {len(cases)}: {told}")
                failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(cases)} cases", failed)
    if skipped == len(cases):
        pytest.skip("every case is skipped")


def product(*values: Iterable[object]) -> list[tuple[object, ...]]:
    """Return every combination."""
    import itertools

    return list(itertools.product(*values))


def diagonal(*values: Iterable[object]) -> list[tuple[object, ...]]:
    """Return the fewest combinations that contain every value of each list."""
    lists: list[Sequence[object]] = [list(items) for items in values]
    return [tuple(items[n % len(items)] for items in lists) for n in range(max(map(len, lists)))]


def rest_slow(values: Iterable[object], default: Iterable[object]) -> list[object]:
    """Return values for `pytest.mark.parametrize`: those of the default run unmarked, the others marked as slow."""
    wanted, found = list(default), list(values)
    assert all(value in found for value in wanted), "the default run must use some of them"
    return [value if value in wanted else slowly(value) for value in found]


def slowly(value: object) -> object:
    """Return a value marked as slow."""
    return pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)
