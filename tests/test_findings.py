"""Faults are found one by one, told once, and shown in a table that a log file can hold."""

import io

import pytest

from lumina_jax import findings
from lumina_jax.errors import InputError
from lumina_jax.findings import ERROR, NOT_CHECKED, OK, WARNING, Finding, MissingError


def sound(_):
    yield findings.ok("all is well")


def refused(_):
    yield findings.ok("the first half is well")
    raise InputError("the second half is not")


def half_lacking(_):
    yield findings.ok("the first half is well")
    raise MissingError("refused", ERROR, "no such part")


def broken(_):
    yield from ()
    raise ZeroDivisionError("a mistake of the program")


def lacking(_):
    raise MissingError("refused", ERROR, "no such part")
    yield


def test_a_check_that_fails_hides_no_other():
    checks = {"broken": broken, "refused": refused, "lacking": lacking}
    checks |= {"half": half_lacking, "sound": sound}
    found = findings.examine(checks, None)
    assert found == [
        Finding("broken", ERROR, "ZeroDivisionError: a mistake of the program"),
        Finding("refused", OK, "the first half is well"),
        Finding("refused", ERROR, "the second half is not"),
        Finding("lacking", NOT_CHECKED, "because of what is said under 'refused'"),
        Finding("half", OK, "the first half is well"),
        Finding("half", NOT_CHECKED, "the rest, because of what is said under 'refused'"),
        Finding("sound", OK, "all is well"),
    ]


def test_a_part_that_is_missing_is_told_of_by_its_own_check():
    assert findings.examine({"refused": lacking}, None) == [
        Finding("refused", ERROR, "no such part")
    ]


def test_one_fault_that_two_checks_meet_is_told_once():
    found = findings.examine({"first": refused, "second": refused}, None)
    assert found[-1] == Finding("second", NOT_CHECKED, "because of what is said under 'first'")


def test_a_check_that_meets_a_fault_twice_tells_it_once():
    def twice(_):
        yield findings.error("the second half is not")
        yield from refused(_)

    assert [each.level for each in findings.examine({"twice": twice}, None)] == [ERROR, OK]


def test_what_a_door_refuses_is_a_finding():
    def door(value):
        if value < 0:
            raise InputError(f"{value} is negative")

    assert list(findings.faults(door, 1)) == []
    assert list(findings.faults(door, value=-1)) == [(ERROR, "-1 is negative")]


@pytest.fixture
def three_processes(monkeypatch):
    """What three processes found; the second lacks the data, the third has a clock of its own."""
    well, lacks = Finding("data", OK, "64 records"), Finding("data", ERROR, "no data")
    warns = Finding("text", WARNING, "not fetched")
    told = [
        ("a", [well, Finding("speed", OK, "3 ms"), warns]),
        ("b", [lacks, Finding("speed", OK, "4 ms"), warns]),
        ("c", [well, Finding("speed", OK, "5 ms"), warns]),
    ]
    plain = [[host, [(f.check, f.level, f.text) for f in found]] for host, found in told]
    monkeypatch.setattr(findings, "gather", lambda _: plain)
    return told


def test_a_fault_names_the_processes_that_have_it_unless_all_do(three_processes):
    for _, own in three_processes:
        found = findings.gather_findings(own)
        assert Finding("data", ERROR, "process 1 (b): no data") in found
        assert Finding("text", WARNING, "not fetched") in found
    own = three_processes[0][1]
    assert [f.text for f in findings.gather_findings(own) if f.level == OK] == [
        "64 records", "3 ms",
    ]  # fmt: skip


def test_the_report_fits_a_log_file_of_100_columns():
    file = io.StringIO()
    long = "word " * 60 + "\n" + "\n".join(f"missing tensor {n}" for n in range(50))
    findings.render("Report", [Finding("weights", ERROR, long), Finding("disk", OK, "room")], file)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 30
    assert "and 39 more" in file.getvalue()
    assert "\x1b" not in file.getvalue()
