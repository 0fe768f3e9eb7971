"""Who may use the API: keys (Bearer) and logins (Basic), kept as Argon2 hashes.

A hash takes milliseconds by design, so a credential that was right once is remembered as an HMAC
under a key that lives as long as the process. Comparisons take constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import threading
from collections.abc import Iterable

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

#: A key that begins so is taken for a hash of the key.
HASH_PREFIX = "$argon2"
MAX_CREDENTIAL_CHARACTERS = 1024


class AccessControl:
    """Tells whether an Authorization header opens the API. Every method may run on any thread.

    Args:
        keys: Accepted as `Bearer KEY`; each the key itself or its Argon2 hash.
        logins: User names and passwords, accepted as `Basic …`.
    """

    def __init__(self, *, keys: Iterable[str] = (), logins: Iterable[tuple[str, str]] = ()) -> None:
        # OWASP's least for Argon2id: 19 MiB, two passes. More would let wrong keys cost memory.
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        self._hashes = [("bearer", self._hash(key)) for key in keys]
        self._hashes += [("basic", self._hash(f"{user}:{word}")) for user, word in logins]
        self._mac_key = secrets.token_bytes(32)
        self._accepted: set[bytes] = set()
        self._one_at_a_time = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in."""
        return not self._hashes

    @property
    def challenge(self) -> str:
        """What to answer as WWW-Authenticate."""
        schemes = {scheme for scheme, _ in self._hashes}
        named = ("Bearer",) if "bearer" in schemes else ()
        return ", ".join(
            (*named, 'Basic realm="api", charset="UTF-8"') if "basic" in schemes else named
        )

    def remembers(self, header: str | None) -> bool:
        """Tell at once whether a header was found right before, or is not needed."""
        if self.is_open:
            return True
        credential = _parse_header(header)
        return credential is not None and self._is_accepted(self._mac(*credential))

    def allows(self, header: str | None) -> bool:
        """Tell whether a header is right; takes milliseconds the first time."""
        if self.is_open:
            return True
        credential = _parse_header(header)
        if credential is None:
            return False
        mac = self._mac(*credential)
        if self._is_accepted(mac):
            return True
        # One at a time: a crowd with wrong keys must not take all memory and processors.
        with self._one_at_a_time:
            if self._is_accepted(mac) or self._verify(*credential):
                self._accepted.add(mac)
                return True
        return False

    def _hash(self, secret: str) -> str:
        return secret if secret.startswith(HASH_PREFIX) else self._hasher.hash(secret)

    def _mac(self, scheme: str, secret: str) -> bytes:
        text = f"{scheme} {secret}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._mac_key, text, hashlib.sha256)

    def _is_accepted(self, mac: bytes) -> bool:
        matches = [hmac.compare_digest(mac, known) for known in tuple(self._accepted)]
        return any(matches)  # after all were compared, so that time tells nothing

    def _verify(self, scheme: str, secret: str) -> bool:
        for known_scheme, known in self._hashes:
            if scheme == known_scheme:
                try:
                    return self._hasher.verify(known, secret)
                except (VerificationError, InvalidHashError):
                    continue
        return False


def _parse_header(header: str | None) -> tuple[str, str] | None:
    """Return scheme and secret of an Authorization header; None if it has no such form."""
    scheme, _, value = (header or "").partition(" ")
    scheme, value = scheme.lower(), value.strip()
    if not value or len(value) > MAX_CREDENTIAL_CHARACTERS:
        return None
    if scheme == "bearer":
        return scheme, value
    if scheme != "basic":
        return None
    try:
        return scheme, base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
