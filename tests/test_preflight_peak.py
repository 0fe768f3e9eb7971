"""Preflight against the peak that the system reports for a real load on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen.free_memory import FreeMemory
from qwen.preflight import Wish, check_memory

#: Loads a folder and answers one prompt; prints the most memory that was ever resident.
PROGRAM = """
import json, sys, threading
from pathlib import Path
from qwen.fast_decoder import kernels_folder
from qwen.loading import load_folder
from qwen.local import build_backend
from qwen.messages import SamplingParams

folder, dtype, tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
packs = dtype == "int8"
backend = build_backend(
    *load_folder(folder, dtype="bfloat16" if packs else dtype),
    name="measured",
    kernels_folder=kernels_folder() if packs else None,
)
ids = [1000 + 37 * number for number in range(tokens)]
params = SamplingParams(max_new_tokens=4, temperature=0.7, top_p=0.9)
for step in backend._engine.submit(ids, params, cancel=threading.Event()):
    pass
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}))
"""


def measure(folder, dtype, tokens):
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), dtype, str(tokens)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.integration
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read as Linux has them"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_estimate_is_within_a_tenth_of_the_measured_peak(dtype, tmp_path):
    from qwen.checkpoint import resolve_embedded

    # One of the two dtypes is that of the files, which are mapped then; the other is a copy.
    folder = resolve_embedded(gguf_dtype="bfloat16")
    peak = measure(folder, dtype, 500)["VmHWM"]
    packs = dtype == "int8"
    wish = Wish(device="cpu", dtype="bfloat16" if packs else dtype, packs=packs)
    estimate = check_memory(str(folder), wish, context=504, free=FreeMemory(10**12)).estimate
    print(f"{dtype}: measured {peak / 1e6:.0f} MB, estimated {estimate.resident / 1e6:.0f} MB")
    assert peak == pytest.approx(estimate.resident, rel=0.1)
