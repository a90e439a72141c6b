import pytest

from wml_ray.errors import one_line, root_cause


def test_an_error_is_one_line_of_limited_length():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line("x" * 500, limit=7) == "x" * 6 + "…"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def raise_in_layers():
    try:
        raise ConnectionRefusedError(111, "Connection refused")
    except OSError as error:
        raise RuntimeError("HTTPConnectionPool(...)") from error


def test_the_root_cause_is_the_message_of_the_first_error():
    with pytest.raises(RuntimeError) as caught:
        raise_in_layers()
    assert root_cause(caught.value) == "Connection refused"
