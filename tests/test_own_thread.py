import threading

import pytest

from qwen.own_thread import run_on_own_thread


def test_result_comes_from_a_thread_that_has_ended():
    thread = run_on_own_thread(threading.current_thread)
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_error_is_raised_where_the_result_is_wanted():
    def fail():
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        run_on_own_thread(fail)
