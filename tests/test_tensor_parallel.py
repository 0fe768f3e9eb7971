"""Tensor parallelism on the CPU: two processes give the numbers of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_v1 import CHECKPOINT, assert_parity, columns, load_tiny, tensors
from safetensors.torch import load_file
from tensor_parallel_rank import PROMPTS, gradients, measure

from qwen.configuration_qwen import QWenConfig
from qwen.errors import InvalidSetting
from qwen.modeling_qwen import QWenLMHeadModel
from qwen.tensor_parallel import QKV_STYLE, prepare_tensor_parallelism

HERE = Path(__file__).parent
NUM_PROCESSES = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_group(folder: Path, result: Path) -> None:
    """Run the processes as torchrun would; the first failure ends them all."""
    shared = {"WORLD_SIZE": str(NUM_PROCESSES), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, str(HERE / "tensor_parallel_rank.py"), str(folder), str(result)]
    logs = [result.with_name(f"rank{rank}.log").open("w+") for rank in range(NUM_PROCESSES)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=180)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.seek(0)
        output = "\n".join(log.read()[-3000:] for log in logs)
        for log in logs:
            log.close()
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, output


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = tmp_path_factory.mktemp("group") / "result.safetensors"
    run_group(CHECKPOINT, result)
    return load_file(result)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    model = load_tiny().eval()
    return measure(model) | gradients(model)


@pytest.mark.parametrize("length", PROMPTS)
def test_two_processes_give_the_logits_of_one(
    parallel: dict[str, Any], alone: dict[str, Any], length: int
) -> None:
    # 100 tokens are past the trained length: dynamic NTK and log-n are at work.
    for kind in ("full", "steps"):
        assert_parity(parallel[f"{kind}.{length}"], alone[f"{kind}.{length}"])


def test_two_processes_generate_the_same_tokens(
    parallel: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert torch.equal(parallel["greedy"], alone["greedy"])


def test_each_process_caches_its_own_heads_only(
    parallel: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert alone["heads"] == 4 and parallel["heads"] == 2


def test_two_processes_give_the_gradients_of_one(
    parallel: dict[str, Any], alone: dict[str, Any]
) -> None:
    names = [name for name in alone if name.startswith("grad.")]
    assert len(names) == 27
    for name in names:
        torch.testing.assert_close(parallel[name], alone[name], atol=2e-4, rtol=1e-3)


def test_plan_covers_every_matrix() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = QWenLMHeadModel(QWenConfig(vocab_size=64, intermediate_size=64, **sizes))
    plan = model.tp_plan
    matrices = {name for name, weight in model.named_parameters() if weight.ndim == 2}
    planned = {name.replace("*", str(i)) + ".weight" for name in plan for i in range(2)}
    assert matrices == planned
    assert plan["transformer.h.*.attn.c_attn"] == QKV_STYLE


@pytest.mark.parametrize(
    "options",
    [{"tp_plan": "auto", "tp_size": 3}, {"distributed_config": {"tp_size": 3}}],
)
def test_heads_that_cannot_be_dealt_out_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=r"4 attention heads .* to 3 processes.*1, 2 or 4"):
        load_tiny(**options)


def test_number_of_processes_is_that_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidSetting, match="to 3 processes"):
        prepare_tensor_parallelism(4, {"tp_plan": "auto"})
    prepare_tensor_parallelism(4, {"tp_plan": "auto", "tp_size": 2})
    prepare_tensor_parallelism(4, {"device_map": "auto"})


def test_two_processes_give_the_logits_of_the_published_code(parallel: dict[str, Any]) -> None:
    golden = tensors()
    assert_parity(parallel["full.32"][0], golden["a.logits"])
    assert_parity(parallel["full.100"][0][:, columns()], golden["b.ntk1.logn1.L100.cols"])
