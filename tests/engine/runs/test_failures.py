"""Errors of libraries and systems, told in words a person can act on."""

import errno
import os

import pytest

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.runs.failures import GIB, explain, is_disk_full, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("No space left on device (os error 28)")],
)
def test_a_full_disk_in_any_library_s_words(error: Exception) -> None:
    assert is_disk_full(error)
    assert explain(error).what == "The disk is full."


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
     RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), OSError(errno.ENOMEM, "Cannot allocate memory")],
)  # fmt: skip
def test_too_little_memory_says_what_would_fit(error: Exception) -> None:
    told = explain(error, had_bytes=4 * GIB)
    assert "not enough memory" in told.what
    assert "4.0 GiB" in told.why
    assert "2.5 GiB" in told.remedy
    assert "No model fits" in explain(error, had_bytes=GIB).remedy


def test_a_cause_below_the_error_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise ValueError("could not save") from cause
    except ValueError as error:
        assert is_disk_full(error)
        assert not is_out_of_memory(error)


def test_refusals_stay_what_they_are() -> None:
    refusal = InputError("what", "why", "remedy")
    assert explain(refusal) is refusal
    assert isinstance(explain(KeyboardInterrupt()), Cancelled)


def test_anything_else_names_its_kind_and_says_how_to_go_on() -> None:
    told = explain(ZeroDivisionError("division\nby zero"))
    assert type(told) is BitpressError
    assert told.why == "ZeroDivisionError: division by zero"
    assert "resum" in told.remedy
