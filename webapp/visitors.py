"""Who asks, judged by the address, and how many replies of the page one visitor has under way.

Pure; knows no web framework. Addresses behind a proxy are the server's matter: it puts those of
X-Forwarded-For in place, where it trusts the proxy.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qwen.errors import InvalidRequest
from webapp.settings import VisitorLimit
from webapp.text import Words


class VisitorBusy(InvalidRequest):
    """A visitor has as many replies under way as one may have."""


def client_name(host: str) -> str:
    """Return whom a request counts for: an address, or its network where one host has many."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _is_this_machine(client: str) -> bool:
    try:
        return ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False


class Visitors:
    """Keeps one visitor from holding all places of the page. May be used from several threads."""

    def __init__(self, limit: VisitorLimit) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._replies: Counter[str] = Counter()

    @contextmanager
    def reply(self, host: str, words: Words) -> Iterator[None]:
        """Hold one of a visitor's places while a reply is under way.

        Args:
            host: The address that asks.
            words: The language of a refusal.

        Raises:
            VisitorBusy: All of them are taken.
        """
        client, most = client_name(host), self._limit.max_replies
        if most is None or (self._limit.spares_this_machine and _is_this_machine(client)):
            yield
            return
        with self._lock:
            if self._replies[client] >= most:
                raise VisitorBusy(words("visitor_busy", count=most))
            self._replies[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._replies[client] -= 1
                if not self._replies[client]:
                    del self._replies[client]
