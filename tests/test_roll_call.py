"""The roll, over real sockets: each process of a run is a thread here."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lumina_jax.errors import InputError, JoinError
from lumina_jax.roll_call import Place, call_the_roll
from tests.small_data import free_address

HOSTS = ("host-0", "host-1", "host-2")


def outcomes(places, timeout: float):
    """What each gets: None, or the message."""

    def one(place):
        try:
            return call_the_roll(place, timeout)
        except JoinError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(one, places))


def test_all_pass_when_all_are_there():
    address = free_address()
    places = [Place(address, 8, index) for index in reversed(range(8))]  # process 0 comes last
    assert outcomes(places, 20.0) == [None] * 8


def test_all_that_wait_learn_who_is_missing():
    address = free_address()
    places = [Place(address, 3, index, hosts=HOSTS) for index in (0, 1)]
    here = socket.gethostname()
    first, second = outcomes(places, 0.8)
    expected = (
        f"1 of 3 processes did not join within 0.8 s: 2 (host-2); joined: 0 ({here}), 1 ({here})."
    )
    assert expected in first
    assert second == first


def test_a_host_that_is_not_known_is_named_by_its_number():
    (message,) = outcomes([Place(free_address(), 4, 0)], 0.2)
    assert "3 of 4 processes did not join within 0.2 s: 1, 2, 3; joined: 0" in message


def test_a_long_list_is_cut():
    (message,) = outcomes([Place(free_address(), 1000, 0)], 0.2)
    assert "63, 64 and 935 more; joined: 0" in message


def test_two_processes_with_one_number_end_all():
    address = free_address()
    for message in outcomes([Place(address, 3, index) for index in (0, 1, 1)], 20.0):
        assert "Two processes say that they are process 1 of 3" in message


def test_processes_that_were_told_different_numbers_end_all():
    address = free_address()
    for message in outcomes([Place(address, 3, 0), Place(address, 2, 1)], 20.0):
        assert "was started as one of 2, process 0 on" in message


def test_a_process_that_cannot_reach_process_0_says_where_it_called():
    address = free_address()
    (message,) = outcomes([Place(address, 3, 2)], 0.3)
    assert f"did not reach process 0 at {address} within 0.3 s" in message
    assert "port is open between the hosts" in message


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (message,) = outcomes([Place(address, 2, 0)], 5.0)
    assert f"Process 0 cannot listen at {address}" in message


def test_strangers_and_processes_that_end_are_not_counted():
    """One who speaks nonsense, and one who joined and was killed: both calls were in vain."""
    address = free_address()
    host, port = address.split(":")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(outcomes, [Place(address, 2, 0)], 2.0)
        for line in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1, "num_processes": 2, "host": "a"'):
            call(host, port, line)
        message = waiting.result()[0]
    assert "1 of 2 processes did not join within 2 s: 1; joined: 0" in message


def call(host, port, line):
    for _ in range(100):
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(line)
                return
        except ConnectionRefusedError:  # process 0 is about to listen
            time.sleep(0.01)
    raise AssertionError("process 0 does not listen")


def test_one_that_joined_and_left_is_missing_again():
    address = free_address()
    host, port = address.split(":")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(outcomes, [Place(address, 3, 0)], 1.5)
        call(host, port, b'{"process": 1, "num_processes": 3, "host": "gone"}\n')
        message = waiting.result()[0]
    assert "2 of 3 processes did not join within 1.5 s: 1, 2; joined: 0" in message


def test_a_process_alone_waits_for_nobody():
    call_the_roll(Place(free_address(), 1, 0), 0.0)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http", "host:70000", ""])
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(InputError, match="needed: host:port of process 0"):
        Place(address, 2, 0)


@pytest.mark.parametrize(("count", "index"), [(3, 3), (3, -1), (0, 0)])
def test_a_number_that_is_not_one_of_them_is_refused(count, index):
    with pytest.raises(InputError, match=f"process_id={index} is not one of {count}"):
        Place("host:80", count, index)
