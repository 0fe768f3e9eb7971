"""Flags, environment and platform defaults, in that order."""

import pytest

from qwen.serving_limits import ServingLimits
from webapp.settings import Settings, VisitorLimit, parse_settings


def test_without_flags_the_reference_address_and_the_automatic_checkpoint_are_taken():
    settings = parse_settings([], {})
    assert settings == Settings()
    assert (settings.server_name, settings.server_port) == ("127.0.0.1", 8000)


def test_reference_flags_keep_their_names():
    argv = [
        "-c",
        "./x",
        "--cpu-only",
        "--share",
        "--inbrowser",
        "--server-port",
        "81",
        "--server-name",
        "h",
    ]
    settings = parse_settings(argv, {})
    assert (settings.checkpoint, settings.load.device, settings.share) == ("./x", "cpu", True)
    assert (settings.inbrowser, settings.server_port, settings.server_name) == (True, 81, "h")


def test_flag_wins_over_environment_over_platform():
    environ = {"GRADIO_SERVER_PORT": "9001", "MODELSCOPE_ENVIRONMENT": "studio"}
    assert parse_settings(["--server-port", "9002"], environ).server_port == 9002
    assert parse_settings([], environ).server_port == 9001
    assert parse_settings([], {"MODELSCOPE_ENVIRONMENT": "studio"}).server_port == 7860


def test_studio_listens_on_all_addresses():
    assert parse_settings([], {"MODELSCOPE_ENVIRONMENT": "studio"}).server_name == "0.0.0.0"


def test_space_leaves_address_to_the_platform():
    settings = parse_settings([], {"SPACE_ID": "a/b"})
    assert (settings.server_name, settings.server_port) == (None, None)


@pytest.mark.parametrize(
    ("argv", "environ", "limit"),
    [
        ([], {}, VisitorLimit(4)),
        (["--max-running", "6"], {}, VisitorLimit(3)),
        (["--max-running", "1"], {}, VisitorLimit(1)),
        (["--max-running", "32"], {}, VisitorLimit(4)),
        (["--max-replies-per-visitor", "9"], {}, VisitorLimit(9, spares_this_machine=False)),
        ([], {"SPACE_ID": "a/b"}, VisitorLimit(None)),
    ],
)
def test_a_visitors_share_of_the_page_leaves_places_for_others(argv, environ, limit):
    assert parse_settings(argv, environ).visitors == limit


def test_share_without_login_warns_and_with_login_does_not():
    assert parse_settings(["--share"], {}).warnings
    assert parse_settings([], {"GRADIO_SHARE": "true"}).warnings
    assert not parse_settings(["--share", "--auth", "u:p"], {}).warnings


def test_password_may_hold_a_colon_and_come_from_the_environment():
    assert parse_settings(["--auth", "u:p:q"], {}).auth == ("u", "p:q")
    assert parse_settings([], {"QWEN_AUTH": "u:p"}).auth == ("u", "p")


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--auth", "nopassword"], {}, "USER:PASSWORD"),
        (["--auth", ":p"], {}, "USER:PASSWORD"),
        (["--server-port", "0"], {}, "65535"),
        (["--server-port", "many"], {}, "65535"),
        ([], {"GRADIO_SERVER_PORT": "x"}, "GRADIO_SERVER_PORT"),
        (["--max-input-tokens", "-5"], {}, "above 0"),
        (["--dtype", "int3"], {}, "int3"),
        (["--kv-cache", "int3"], {}, "int3"),
        (["--num-gpus", "0"], {}, "above 0"),
        (["--num-gpus", "-1"], {}, "above 0"),
        (["--num-gpus", "two"], {}, "above 0"),
        (["--num-gpus", "2", "--cpu-only"], {}, "contradict"),
        (["--offload-folder", __file__], {}, "not a folder"),
        (["--offload-folder", ""], {}, "not a folder"),
        (["--ntk-policy", "shrink"], {}, "shrink"),
    ],
)
def test_wrong_value_is_named(argv, environ, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings(argv, environ)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_gpus_and_disk_are_left_to_the_model_unless_asked_for(tmp_path):
    settings = parse_settings([], {})
    assert (settings.load.num_gpus, settings.load.offload_folder) == (None, None)
    settings = parse_settings(["--num-gpus", "2", "--offload-folder", str(tmp_path / "new")], {})
    assert (settings.load.num_gpus, settings.load.offload_folder) == (2, tmp_path / "new")


def test_offload_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_settings(["--offload-folder", "x"], {}).load.offload_folder == tmp_path / "x"


def test_preflight_is_obeyed_unless_the_user_insists():
    assert not parse_settings([], {}).load.skip_preflight
    assert parse_settings(["--skip-preflight"], {}).load.skip_preflight


def test_replies_keep_the_published_ntk_unless_asked_otherwise():
    assert parse_settings([], {}).load.ntk_policy == "published"
    assert parse_settings(["--ntk-policy", "grow"], {}).load.ntk_policy == "grow"


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings(["--help"], {})
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name in ("--checkpoint-path", "--max-input-tokens", "--auth", "QWEN_CACHE", "modelscope:"):
        assert name in text


def test_limits_of_serving_are_read():
    load = parse_settings([], {}).load
    assert (load.limits, load.strict_reproducible) == (ServingLimits(), False)
    flags = ["--max-running", "3", "--max-waiting", "5", "--cache-mb", "700"]
    load = parse_settings([*flags, "--strict-reproducible"], {}).load
    assert load.limits == ServingLimits(max_running=3, max_waiting=5, cache_bytes=700_000_000)
    assert load.strict_reproducible


def test_a_remote_engine_takes_the_place_of_the_checkpoint():
    settings = parse_settings(
        ["--base-url", "http://127.0.0.1:8080", "--api-key-env", "KEY", "--model", "m"],
        {"KEY": "sk-1", "QWEN_CHECKPOINT": "ignored"},
    )
    assert settings.remote is not None
    assert settings.remote.base_url == "http://127.0.0.1:8080/v1"
    assert (settings.remote.model, settings.remote.api_key) == ("m", "sk-1")
    assert "sk-1" not in repr(settings)
