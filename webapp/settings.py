"""All configuration, as one frozen value, from the command line and the environment.

The only reader of either in `webapp/`. Precedence: flag, environment variable, what the hosting
platform wants, default. Flags and defaults of the reference demo keep their names.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwen.load_options import (
    DEFAULT_OPTIONS,
    LoadOptions,
    add_load_arguments,
    positive_int,
    read_checkpoint,
    read_load_options,
)
from qwen.remote_options import RemoteOptions, add_remote_arguments, read_remote_options

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
STUDIO_HOST, STUDIO_PORT = "0.0.0.0", 7860
#: Elsewhere than on Spaces and Studio, which show the page in a frame of theirs.
DEFAULT_FRAME_ANCESTORS = "'self'"
#: Room for the longest conversation that the page keeps, in three-byte characters.
DEFAULT_REQUEST_MB = 16
#: With the notices that follow, an ordinary Ctrl-C takes less than three seconds.
DEFAULT_STOP_SECONDS = 1.5

DESCRIPTION = """\
Chat with a Qwen model in the browser. Without any flag, a small real Qwen runs on this
machine's CPU."""

EPILOG = """\
checkpoints:
  auto                         the embedded Qwen2.5-Coder-0.5B-Instruct; with a GPU, a larger one
  ./folder                     a local checkpoint folder (config.json, *.safetensors, tokenizer)
  ./model.gguf                 a local GGUF file; converted once, then cached
  OWNER/NAME[@REVISION]        from Hugging Face
  modelscope:OWNER/NAME[@REV]  from ModelScope

environment:
  QWEN_CHECKPOINT              as --checkpoint-path
  QWEN_AUTH, QWEN_API_KEY, QWEN_API_AUTH
                               as --auth, --api-key and --api-auth (keeps a password off the
                               process list)
  QWEN_CACHE                   where weights are kept (default ~/.cache/qwen-webui)
  GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, GRADIO_SHARE
                               as --server-name, --server-port and --share
"""


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What the API is to be.

    Attributes:
        mode: "beside" the page, "only" the API, or "none".
        keys: Each opens the API (Bearer); a key or its Argon2 hash.
        login: User name and password that open the API (Basic).
        cors_origins: Web pages of these origins may use it.
        max_requests: At once, waiting ones included.
        max_requests_per_client: The same, of one address.
    """

    mode: Literal["beside", "only", "none"] = "beside"
    keys: tuple[str, ...] = field(default=(), repr=False)
    login: tuple[str, str] | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    max_requests: int = 128
    max_requests_per_client: int = 16


@dataclass(frozen=True, slots=True)
class VisitorLimit:
    """How many replies of the page one visitor may have under way.

    Attributes:
        max_replies: Of one address; None is no limit.
        spares_this_machine: Do not limit whoever sits at this machine, or a proxy on it that does
            not tell for whom it asks.
    """

    max_replies: int | None = 4
    spares_this_machine: bool = True


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server was asked for.

    Attributes:
        checkpoint: A name as `qwen.checkpoint` reads it.
        load: How to load and run it.
        remote: The engine that answers instead of a checkpoint.
        server_name: Address to listen on; None lets the platform choose.
        server_port: Port to listen on; None lets the platform choose.
        auth: User name and password that the page asks for.
        system_prompt: The system prompt that a new visitor starts with.
        api: The API beside the page, or instead of it.
        visitors: How much of the page one visitor may take.
        frame_ancestors: Sites that may show the page in a frame; None leaves it to browsers,
            which let everybody.
        max_request_bytes: The largest body of a request, to the page or to the API.
        stop_seconds: So long running replies may go on when the server is told to stop.
        log_format: Of the lines on standard error.
        warnings: Sentences to print at start.
    """

    checkpoint: str = "auto"
    load: LoadOptions = DEFAULT_OPTIONS
    remote: RemoteOptions | None = None
    share: bool = False
    inbrowser: bool = False
    server_name: str | None = DEFAULT_HOST
    server_port: int | None = DEFAULT_PORT
    auth: tuple[str, str] | None = field(default=None, repr=False)
    system_prompt: str = "You are a helpful assistant."
    api: ApiOptions = ApiOptions()
    visitors: VisitorLimit = VisitorLimit()
    frame_ancestors: str | None = DEFAULT_FRAME_ANCESTORS
    max_request_bytes: int = DEFAULT_REQUEST_MB * 2**20
    stop_seconds: float = DEFAULT_STOP_SECONDS
    log_format: Literal["text", "json"] = "text"
    warnings: tuple[str, ...] = ()


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read the command line and the environment.

    Raises:
        SystemExit: After `--help`, or with code 2 and a message on wrong values.
    """
    parser = _build_parser()
    given = parser.parse_args(argv)
    host, port = _address(parser, given, environ)
    auth = _login(parser, "--auth", given.auth, environ.get("QWEN_AUTH"))
    share = given.share or environ.get("GRADIO_SHARE", "").lower() in ("1", "true", "yes")
    warnings = []
    if auth is None and share:
        warnings.append(
            "--share without --auth: everyone who learns the public link can use this model. "
            "Add --auth USER:PASSWORD to ask for a login."
        )
    api = _read_api_options(parser, given, environ)
    return Settings(
        checkpoint=read_checkpoint(given, environ),
        load=read_load_options(parser, given),
        remote=read_remote_options(parser, given, environ),
        share=share,
        inbrowser=given.inbrowser,
        server_name=host,
        server_port=port,
        auth=auth,
        system_prompt=given.system_prompt,
        api=api,
        visitors=_visitor_limit(given, environ),
        frame_ancestors=_frame_ancestors(parser, given.frame_ancestors, environ),
        max_request_bytes=given.max_request_mb * 2**20,
        stop_seconds=given.stop_seconds,
        log_format=given.log_format,
        warnings=tuple(warnings),
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_load_arguments(parser)
    add_remote_arguments(parser)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--system-prompt",
        metavar="TEXT",
        default=Settings.__dataclass_fields__["system_prompt"].default,
        help="system prompt that a new visitor starts with (default: %(default)s)",
    )
    page.add_argument("--inbrowser", action="store_true", help="open the page in a browser")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--server-name", metavar="HOST", help=f"address to listen on (default: {DEFAULT_HOST})"
    )
    server.add_argument(
        "--server-port",
        type=_port,
        metavar="PORT",
        help=f"port to listen on (default: {DEFAULT_PORT})",
    )
    server.add_argument("--share", action="store_true", help="make a public link through Gradio")
    server.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for this login before showing the page; it closes the API too",
    )
    _add_limits(server)
    _add_api_arguments(parser.add_argument_group("API (/v1, as OpenAI's)"))
    return parser


def _add_limits(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--frame-ancestors",
        metavar="SOURCES",
        help="sites that may show the page in a frame, as in a Content-Security-Policy "
        "(default: 'self'; any on Spaces and Studio)",
    )
    server.add_argument(
        "--max-replies-per-visitor",
        type=positive_int,
        metavar="N",
        help="replies of the page at once for one address (default: 4, or half of --max-running "
        "if that is less; no limit for this machine itself, nor on Spaces and Studio)",
    )
    server.add_argument(
        "--max-request-mb",
        type=positive_int,
        metavar="N",
        default=DEFAULT_REQUEST_MB,
        help="largest request in MiB (default: %(default)s)",
    )
    server.add_argument(
        "--stop-seconds",
        type=_seconds,
        metavar="S",
        default=DEFAULT_STOP_SECONDS,
        help="so long running replies may go on after Ctrl-C or SIGTERM (default: %(default)g)",
    )
    server.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines of key=value or of JSON (default: %(default)s)",
    )


def _add_api_arguments(api: argparse._ArgumentGroup) -> None:
    defaults = ApiOptions()
    modes = api.add_mutually_exclusive_group()
    modes.add_argument("--api-only", action="store_true", help="serve the API without the page")
    modes.add_argument("--no-api", action="store_true", help="serve the page without the API")
    api.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="ask clients for this key (Bearer); may be given several times, and as an Argon2 hash",
    )
    api.add_argument(
        "--api-auth", metavar="USER:PASSWORD", help="ask clients for this login (Basic)"
    )
    api.add_argument(
        "--cors-origin",
        action="append",
        type=_origin,
        metavar="ORIGIN",
        help="let web pages of this origin use the API, for example https://example.org; may be "
        "given several times (default: none)",
    )
    api.add_argument(
        "--max-requests",
        type=positive_int,
        metavar="N",
        default=defaults.max_requests,
        help="requests at once, waiting ones included (default: %(default)s)",
    )
    api.add_argument(
        "--max-requests-per-client",
        type=positive_int,
        metavar="N",
        default=defaults.max_requests_per_client,
        help="requests at once of one address (default: %(default)s)",
    )


def _read_api_options(
    parser: argparse.ArgumentParser, given: argparse.Namespace, environ: Mapping[str, str]
) -> ApiOptions:
    keys = given.api_key or [key for key in [environ.get("QWEN_API_KEY")] if key]
    if not all(keys):
        parser.error("--api-key must not be empty")
    return ApiOptions(
        mode="only" if given.api_only else "none" if given.no_api else "beside",
        keys=tuple(keys),
        login=_login(parser, "--api-auth", given.api_auth, environ.get("QWEN_API_AUTH")),
        cors_origins=tuple(given.cors_origin or ()),
        max_requests=given.max_requests,
        max_requests_per_client=given.max_requests_per_client,
    )


def _frame_ancestors(
    parser: argparse.ArgumentParser, given: str | None, environ: Mapping[str, str]
) -> str | None:
    if given is None:
        return None if _is_on_platform(environ) else DEFAULT_FRAME_ANCESTORS
    if not re.fullmatch(r"[!-+\--:<-~]+( [!-+\--:<-~]+)*", given):
        parser.error(
            "--frame-ancestors must be sources with a space between, without ; and , for example "
            "\"'self' https://example.org\""
        )
    return given


def _visitor_limit(given: argparse.Namespace, environ: Mapping[str, str]) -> VisitorLimit:
    if given.max_replies_per_visitor is not None:
        return VisitorLimit(given.max_replies_per_visitor, spares_this_machine=False)
    if _is_on_platform(environ):  # whose proxies ask for everybody
        return VisitorLimit(None)
    most = VisitorLimit().max_replies or 1
    return VisitorLimit(max(min(most, (given.max_running or 2 * most) // 2), 1))


def _is_on_platform(environ: Mapping[str, str]) -> bool:
    return "SPACE_ID" in environ or environ.get("MODELSCOPE_ENVIRONMENT") == "studio"


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin such as https://example.org, without a path, and not *"
        )
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _login(
    parser: argparse.ArgumentParser, flag: str, given: str | None, from_environment: str | None
) -> tuple[str, str] | None:
    text = given if given is not None else from_environment
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        variable = "QWEN_" + flag.removeprefix("--").replace("-", "_").upper()
        parser.error(f"{flag} (or {variable}) must be USER:PASSWORD, with both parts given")
    return user, password


def _address(
    parser: argparse.ArgumentParser, given: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[str | None, int | None]:
    """Choose host and port; None leaves the choice to Gradio's `launch`, as Spaces wants."""
    port_text = environ.get("GRADIO_SERVER_PORT", "")
    if port_text and given.server_port is None:
        try:
            given.server_port = _port(port_text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"GRADIO_SERVER_PORT: {error}")
    host = given.server_name or environ.get("GRADIO_SERVER_NAME")
    if "SPACE_ID" in environ:
        return host, given.server_port
    if environ.get("MODELSCOPE_ENVIRONMENT") == "studio":
        return host or STUDIO_HOST, given.server_port or STUDIO_PORT
    return host or DEFAULT_HOST, given.server_port or DEFAULT_PORT
