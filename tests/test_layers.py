"""The house plan: who may import whom, and which libraries a room may name.

`ROOMS` is the plan; CONTRIBUTING.md mirrors it. A module imports only from a lower layer, so there
is no cycle. Imports inside functions and for type checkers count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent

#: Module → its layer and the third-party packages that it may import, each named by its import.
ROOMS: dict[str, tuple[float, str]] = {
    # Plain values and pure functions.
    "qwen.errors": (0, ""),
    "qwen.text_stream": (0, ""),
    "qwen.carriers": (0, ""),
    "qwen.messages": (0.5, ""),
    "qwen.serving_limits": (0, ""),
    "qwen.own_thread": (0, ""),
    "qwen.load_options": (0.1, ""),
    "qwen.tool_json": (0, ""),
    "qwen.tool_stream": (0.7, ""),
    "qwen.tool_prompt": (0.7, ""),
    "qwen.remote_options": (0.2, ""),
    "qwen.transcript": (0.8, ""),
    "qwen.chat_format": (0.8, ""),
    "qwen.react_stream": (0.8, ""),
    "qwen.react": (0.9, ""),
    "qwen.backend": (1, ""),
    "qwen.token_log": (1, ""),
    "qwen.prompt": (1, ""),
    "qwen.checkpoint_files": (1, ""),
    "qwen.adapters": (1.8, "peft transformers"),
    "qwen.devices": (1, "torch"),
    "qwen.sampling": (1, "torch"),
    "qwen.rope": (1, "torch"),
    "qwen.gptq_format": (1, "torch"),
    "qwen.model_inputs": (1, "torch"),
    "qwen.configuration_qwen": (1, "transformers"),
    "qwen.tokenization_qwen": (1, "transformers tiktoken"),
    # Where weights come from.
    "qwen.weights_cache": (1.5, "filelock"),
    "qwen.gguf_header": (1, "gguf"),
    "qwen.chat_template": (1.4, "jinja2"),
    "qwen.tokenizer": (1.5, "tokenizers"),
    "qwen.hub": (2, "httpx huggingface_hub modelscope tqdm"),
    "qwen.gguf": (2, "torch transformers tokenizers"),
    "qwen.download": (2.2, "httpx"),
    "qwen.checkpoint": (2.4, ""),
    # The native Qwen v1 classes.
    "qwen.ntk_cache": (2, "torch transformers"),
    "qwen.int8_cache": (2.1, "torch transformers"),
    "qwen.tensor_parallel": (1.5, "torch transformers"),
    "qwen.pretrained": (2, "torch safetensors"),
    "qwen.chat": (2, "torch transformers"),
    "qwen.generation_qwen": (2.2, "torch transformers"),
    "qwen.modeling_qwen": (2.4, "torch transformers"),
    # GPTQ checkpoints.
    "qwen.int4_kernels": (1, "torch"),
    "qwen.quantized": (2, "torch"),
    "qwen.gptqmodel_kernels": (2, "torch gptqmodel"),
    "qwen.gptq_loading": (2.5, "torch transformers safetensors accelerate"),
    "qwen.auto": (2.6, "transformers"),
    # Qwen v1 ↔ Qwen2 layout.
    "qwen.convert_map": (1, "torch"),
    "qwen.convert_config": (1.5, "transformers"),
    "qwen.convert_weights": (2, "torch safetensors"),
    "qwen.convert_tokenizer": (2, "tokenizers transformers jinja2"),
    "qwen.convert": (3, ""),
    # Dense → Int4.
    "qwen.gptq_solver": (1.1, "torch"),
    "qwen.quantize_options": (1, ""),
    "qwen.calibration": (1.5, "torch"),
    "qwen.quantize_layout": (2.8, "torch transformers safetensors"),
    "qwen.quantize_layers": (2.9, "torch"),
    "qwen.sensitivity": (2.9, "torch"),
    "qwen.quantize_files": (2.9, "torch safetensors filelock"),
    "qwen.quantize_run": (3, "torch"),
    "qwen.tunable_linear": (1.5, "torch"),
    "qwen.tuning_text": (2.4, "torch transformers"),
    "qwen.tuning_prompts": (1.6, ""),
    "qwen.quantize_tuning": (2.9, "torch"),
    "qwen.tuning_run": (3.1, "torch"),
    "qwen.quantize": (3.2, "transformers"),
    # The fast forward.
    "qwen.kernel_arguments": (0.9, "torch"),
    "qwen.cpu_kernels": (1, "torch"),
    "qwen.mapped_memory": (1, "torch"),
    "qwen.prefix_cache": (1, ""),
    "qwen.kv_store": (1, "torch"),
    "qwen.kv_slots": (1.1, "torch"),
    "qwen.int8_linear": (1.5, "torch"),
    "qwen.decoder_ops": (1.7, "torch"),
    "qwen.triton_products": (1, "triton"),
    "qwen.triton_attention": (1, "triton"),
    "qwen.gpu_products": (1.1, "torch triton"),
    "qwen.gpu_attention": (1.75, "torch triton"),
    "qwen.gpu_ops": (2.5, "torch"),
    "qwen.decoder_weights": (2.8, "torch"),
    "qwen.int8_layers": (2.85, "torch"),
    "qwen.decoder": (2.9, "torch"),
    "qwen.step_inputs": (2.92, "torch"),
    "qwen.cuda_graphs": (2.95, "torch"),
    "qwen.fast_decoder": (2.97, ""),
    "qwen.readers": (2.95, "torch"),
    # Many users on one model.
    "qwen.serving_pace": (0, ""),
    "qwen.attempt": (1, ""),
    "qwen.reply_steps": (1, ""),
    "qwen.waiting_line": (1.1, ""),
    "qwen.proposals": (2.95, "torch"),
    "qwen.sequence": (2.96, "torch"),
    "qwen.step_plan": (2.965, ""),
    "qwen.scheduler": (2.97, "torch"),
    # The running model.
    "qwen.placement": (2.8, "torch transformers safetensors"),
    "qwen.loading": (3, "torch transformers"),
    "qwen.engine": (3, "torch"),
    "qwen.memory_model": (1, ""),
    "qwen.free_memory": (1, "psutil torch"),
    "qwen.preflight_decision": (1.5, ""),
    "qwen.preflight_text": (2, ""),
    "qwen.model_shape": (2.8, "torch transformers"),
    "qwen.checkpoint_shape": (2.9, ""),
    "qwen.preflight": (3.5, "torch"),
    "qwen.local": (4, ""),
    "qwen.remote_engines": (1, ""),
    "qwen.remote_wire": (1.5, ""),
    "qwen.remote_errors": (1, "openai"),
    "qwen.remote_loop": (0, ""),
    "qwen.remote_counting": (1, ""),
    "qwen.remote_reply": (2, ""),
    "qwen.remote": (4, "openai"),
    "qwen.chosen_backend": (4.5, ""),
    "qwen": (5, "transformers"),
    # The terminal chat.
    "qwen.cli_text": (0, ""),
    "qwen.cli_progress": (5.5, "rich"),
    "qwen.cli_input": (5.5, "prompt_toolkit"),
    "qwen.cli_screen": (5.5, "rich markdown_it"),
    "qwen.cli_session": (5.5, ""),
    "qwen.cli_commands": (5.8, ""),
    "qwen.cli": (6, ""),
    # What measures, from outside.
    "qwen.evals": (6, ""),
    "qwen.evals.machine": (6, "torch"),
    "qwen.evals.streaming": (6.5, "httpx"),
    "qwen.evals.report": (6, "matplotlib"),
    "qwen.evals.page_users": (6.6, "httpx gradio_client"),
    "qwen.evals.many_contestants": (6.6, "torch xllamacpp"),
    "qwen.evals.soak": (6.7, "httpx prometheus_client"),
    "qwen.evals.bench_users": (6.8, ""),
    "qwen.evals.random_models": (6, "torch"),
    "qwen.evals.mixed_text": (6.2, "transformers"),
    "qwen.evals.fast_path": (6.4, "torch"),
    "qwen.evals.contestants": (6.45, "torch xllamacpp"),
    "qwen.evals.bench": (6.5, ""),
    "qwen.evals.profile": (6.5, "torch"),
    "qwen.evals.gpu_checks": (6.4, "torch safetensors flash_attn"),
    "qwen.evals.gpu_plan": (6.45, "torch"),
    "qwen.evals.gpu_profile": (6.5, "torch"),
    "qwen.evals.gpu_run": (6.6, "torch"),
    "qwen.evals.corpus": (6, "numpy"),
    "qwen.evals.long_context": (6, "torch transformers"),
    "qwen.evals.perplexity_report": (6, "matplotlib"),
    "qwen.evals.arguments": (6.2, ""),
    "qwen.evals.perplexity": (6.5, "torch"),
    "qwen.evals.ntk_policy": (6.5, "torch matplotlib"),
    # The page.
    "webapp.settings": (7, ""),
    "webapp.text": (7, ""),
    "webapp.spans": (7, ""),
    "webapp.conversation": (7, ""),
    "webapp.render": (7.2, ""),
    "webapp.export": (7.2, "mdtex2html markdown latex2mathml nh3"),
    "webapp.visitors": (7.2, ""),
    "webapp.views": (7.5, ""),
    "webapp.controls": (7.5, ""),
    "webapp.reply_stream": (7.5, ""),
    "webapp.session": (8, "gradio"),
    "webapp.page_updates": (8.2, "gradio"),
    "webapp.reply_handlers": (8.5, "gradio"),
    "webapp.history_handlers": (8.5, "gradio"),
    "webapp.completion_handlers": (8.5, "gradio"),
    "webapp.loading_handlers": (8.7, "gradio"),
    "webapp.ui": (9, "gradio"),
    # The API, and what stands in front of both.
    "webapp.logs": (7, "pythonjsonlogger"),
    "webapp.activity": (7.2, "prometheus_client"),
    "webapp.api_schemas": (8, "pydantic"),
    "webapp.api_auth": (8, "argon2"),
    "webapp.api_errors": (8, ""),
    "webapp.api_requests": (8.2, ""),
    "webapp.api_replies": (8.2, ""),
    "webapp.api_limits": (8.3, "anyio starlette"),
    "webapp.api_stream": (8.5, "starlette"),
    "webapp.api": (8.7, "anyio fastapi prometheus_client starlette"),
    "webapp.front": (9, "starlette"),
    "webapp.server": (10, "tqdm uvicorn"),
    "webapp": (10, ""),
    "app": (11, ""),
}
OURS = ("qwen", "webapp", "app")
WEB_LIBRARIES = {"gradio", "fastapi", "starlette", "uvicorn"}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    paths = [PROJECT / "app.py", *PROJECT.glob("qwen/**/*.py"), *PROJECT.glob("webapp/**/*.py")]
    return {dotted_name(path): path for path in paths}


def dotted_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports, wherever in its code."""
    for node in ast.walk(ast.parse(modules()[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            assert node.module is not None
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in modules() else node.module


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] in OURS}


def third_party(module: str) -> set[str]:
    tops = {name.split(".")[0] for name in imports(module)}
    return tops - set(sys.stdlib_module_names) - set(OURS)


def test_every_module_has_its_place_in_the_plan_and_every_place_its_module():
    assert set(ROOMS) == set(modules())


@pytest.mark.parametrize("module", ROOMS)
def test_module_imports_only_from_lower_layers(module):
    upward = {name for name in own_imports(module) if ROOMS[name][0] >= ROOMS[module][0]}
    assert not upward


@pytest.mark.parametrize("module", ROOMS)
def test_module_imports_only_the_libraries_of_its_row(module):
    assert third_party(module) == set(ROOMS[module][1].split())


def test_no_module_of_qwen_knows_the_web():
    for module in (name for name in modules() if name.split(".")[0] == "qwen"):
        assert not {name for name in own_imports(module) if name.startswith("webapp")}
        assert not third_party(module) & WEB_LIBRARIES


def test_only_settings_reads_the_command_line_and_the_environment_of_the_page():
    for module, path in modules().items():
        if module.startswith("webapp."):
            code = path.read_text("utf-8")
            assert "sys.argv" not in code, module
            assert "os.environ.get" not in code, module
            assert "getenv" not in code, module


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("qwen", ["torch", "transformers", "gradio"]),
        ("qwen.backend", ["torch", "transformers"]),
        ("qwen.checkpoint", ["torch", "transformers", "huggingface_hub", "modelscope"]),
        ("webapp.server", ["torch", "transformers", "gradio"]),
        ("qwen.cli", ["torch", "transformers", "gradio", "openai", "rich"]),
        ("app", ["torch", "transformers", "gradio", "openai"]),
    ],
)
def test_import_pulls_in_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
