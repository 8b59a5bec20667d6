import re

from offramp_contract import errors
from offramp_contract.errors import InvalidValue, OfframpError, Overloaded


def every_error() -> list[type[OfframpError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OfframpError)]


def test_every_error_has_a_code_of_its_own_or_is_the_parent_of_those_that_do() -> None:
    codes = [kind.code for kind in every_error()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_an_error_says_its_message_and_names_the_field() -> None:
    error = InvalidValue("threshold: must be 0 to 1", field="threshold")
    assert (str(error), error.message, error.field) == ("threshold: must be 0 to 1",) * 2 + ("threshold",)
    assert isinstance(error, errors.RequestError)


def test_overload_says_when_to_come_back() -> None:
    assert Overloaded("busy", retry_after_s=1.5).retry_after_s == 1.5
