"""Which remote engine answers instead of a model here: one frozen value, and the flags that say it.

Knows neither HTTP nor the engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from qwen.load_options import given_for_a_model_here


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """Where an engine with an OpenAI API is.

    Attributes:
        base_url: With the path up to "/v1".
        model: One of the engine's models; empty takes the first that it lists.
        api_key: Sent as a bearer token; empty sends none. Not part of the printed value.
    """

    base_url: str
    model: str = ""
    api_key: str = field(default="", repr=False)

    @property
    def is_here(self) -> bool:
        """Whether the engine is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return host == "localhost" or ip_address(host).is_loopback
        except ValueError:
            return False


def add_remote_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that `read_remote_options` reads; returns their group."""
    remote = parser.add_argument_group("remote engine")
    remote.add_argument(
        "--base-url",
        type=_base_url,
        metavar="URL",
        help="chat with the model of another server (vLLM, SGLang, llama.cpp, …) over its OpenAI "
        "API, for example http://127.0.0.1:8080/v1; no model is loaded here",
    )
    remote.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the key for that server (default: no key is sent)",
    )
    remote.add_argument(
        "--model", metavar="NAME", help="model of that server (default: the first that it lists)"
    )
    return remote


def read_remote_options(
    parser: argparse.ArgumentParser, given: argparse.Namespace, environ: Mapping[str, str]
) -> RemoteOptions | None:
    """Return what the flags of `add_remote_arguments` say; None is a model here.

    Raises:
        SystemExit: With code 2 and a message, on flags that contradict each other.
    """
    if given.base_url is None:
        for flag, value in (("--api-key-env", given.api_key_env), ("--model", given.model)):
            if value is not None:
                parser.error(f"{flag} belongs to a remote engine; add --base-url URL")
        return None
    if given.checkpoint_path:
        parser.error(
            "--base-url and --checkpoint-path contradict each other: the model is the remote "
            "engine's. Leave one out; --model chooses among the engine's models"
        )
    without_effect = given_for_a_model_here(parser, given)
    if without_effect:
        parser.error(
            f"--base-url: the model runs on another server, so {', '.join(without_effect)} would "
            "have no effect. Leave that out, and set it at the engine"
        )
    api_key = ""
    if given.api_key_env is not None:
        api_key = environ.get(given.api_key_env, "").strip()
        if not api_key:
            # What is no name is not repeated: it may be the key itself.
            name = given.api_key_env if given.api_key_env.isidentifier() else "of that name"
            parser.error(
                f"--api-key-env: the environment variable {name} is not set or empty. Name the "
                "variable, not the key itself"
            )
        if not api_key.isascii() or not api_key.isprintable():
            parser.error("--api-key-env: the variable holds characters that no key has")
    return RemoteOptions(base_url=given.base_url, model=given.model or "", api_key=api_key)


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        port_is_sound = False
    if not port_is_sound or parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError("not an address such as http://127.0.0.1:8080/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(
            "the address may hold no password, query or fragment; --api-key-env hands over a key"
        )
    return text.rstrip("/") if parts.path.strip("/") else text.rstrip("/") + "/v1"
