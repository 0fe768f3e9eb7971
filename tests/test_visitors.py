"""How many replies of the page one visitor may have under way, and whom a request counts for."""

from contextlib import ExitStack

import pytest

from webapp.settings import VisitorLimit
from webapp.text import words_for
from webapp.visitors import VisitorBusy, Visitors, client_name

WORDS = words_for("en")


def hold(visitors, host, count):
    """Hold so many places; returns what gives them back."""
    held = ExitStack()
    for _ in range(count):
        held.enter_context(visitors.reply(host, WORDS))
    return held


def test_one_reply_too_many_of_an_address_is_refused_until_one_has_ended():
    visitors = Visitors(VisitorLimit(2))
    first = hold(visitors, "203.0.113.5", 1)
    second = hold(visitors, "203.0.113.5", 1)
    with pytest.raises(VisitorBusy, match=r"at once \(2\)"):
        hold(visitors, "203.0.113.5", 1)
    second.close()
    hold(visitors, "203.0.113.5", 1).close()
    first.close()


def test_other_addresses_are_not_refused():
    visitors = Visitors(VisitorLimit(1))
    with hold(visitors, "203.0.113.5", 1):
        hold(visitors, "203.0.113.6", 1).close()


def test_a_refused_reply_takes_no_place():
    visitors = Visitors(VisitorLimit(1))
    held = hold(visitors, "203.0.113.5", 1)
    for _ in range(3):
        with pytest.raises(VisitorBusy):
            hold(visitors, "203.0.113.5", 1)
    held.close()
    hold(visitors, "203.0.113.5", 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_is_spared_unless_the_limit_was_asked_for(host):
    hold(Visitors(VisitorLimit(1)), host, 20)
    with pytest.raises(VisitorBusy):
        hold(Visitors(VisitorLimit(1, spares_this_machine=False)), host, 2)


def test_without_a_limit_nobody_is_refused():
    hold(Visitors(VisitorLimit(None)), "203.0.113.5", 100)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::1"),
        ("unknown", "unknown"),
    ],
)
def test_an_ipv6_network_counts_as_one_client(host, name):
    assert client_name(host) == name
