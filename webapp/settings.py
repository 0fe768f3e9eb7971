"""All configuration, as one frozen value, from the command line and the environment.

The only reader of either in `webapp/`. Precedence: flag, environment variable, what the hosting
platform wants, default. Flags and defaults of the reference demo keep their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen.load_options import (
    DEFAULT_OPTIONS,
    LoadOptions,
    add_load_arguments,
    read_checkpoint,
    read_load_options,
)
from qwen.remote_options import RemoteOptions, add_remote_arguments, read_remote_options

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
STUDIO_HOST, STUDIO_PORT = "0.0.0.0", 7860

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
  QWEN_CHECKPOINT, QWEN_AUTH   as --checkpoint-path and --auth (keeps a password off the
                               process list)
  QWEN_CACHE                   where weights are kept (default ~/.cache/qwen-webui)
  GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, GRADIO_SHARE
                               as --server-name, --server-port and --share
"""


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
        warnings: Sentences to print at start.
    """

    checkpoint: str = "auto"
    load: LoadOptions = DEFAULT_OPTIONS
    remote: RemoteOptions | None = None
    share: bool = False
    inbrowser: bool = False
    server_name: str | None = DEFAULT_HOST
    server_port: int | None = DEFAULT_PORT
    auth: tuple[str, str] | None = None
    system_prompt: str = "You are a helpful assistant."
    warnings: tuple[str, ...] = ()


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read the command line and the environment.

    Raises:
        SystemExit: After `--help`, or with code 2 and a message on wrong values.
    """
    parser = _build_parser()
    given = parser.parse_args(argv)
    host, port = _address(parser, given, environ)
    auth_text = given.auth if given.auth is not None else environ.get("QWEN_AUTH")
    auth = _parse_auth(parser, auth_text) if auth_text else None
    share = given.share or environ.get("GRADIO_SHARE", "").lower() in ("1", "true", "yes")
    warnings = []
    if auth is None and share:
        warnings.append(
            "--share without --auth: everyone who learns the public link can use this model. "
            "Add --auth USER:PASSWORD to ask for a login."
        )
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
        "--auth", metavar="USER:PASSWORD", help="ask for this login before showing the page"
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _parse_auth(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    user, _, password = text.partition(":")
    if not user or not password:
        parser.error("--auth (or QWEN_AUTH) must be USER:PASSWORD, with both parts given")
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
