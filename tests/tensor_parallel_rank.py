"""One process of a tensor-parallel group; run by `test_tensor_parallel.py`, not a test itself.

Usage: python tensor_parallel_rank.py MODEL_FOLDER RESULT_FILE
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from golden_v1 import golden_ids
from safetensors.torch import save_file
from transformers import DynamicCache

from qwen import AutoModelForCausalLM

PROMPTS = (32, 100)


@torch.no_grad()
def measure(model):
    """Logits of whole prompts and of cached steps after them, the shape of the cache, a loss."""
    results = {}
    for length in PROMPTS:
        ids = golden_ids(0, length + 8)
        results[f"full.{length}"] = model(ids[:, :length]).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :length], past_key_values=cache)
        steps = [
            model(ids[:, i : i + 1], past_key_values=cache).logits
            for i in range(length, length + 8)
        ]
        results[f"steps.{length}"] = torch.cat(steps, dim=1)
    results["heads"] = torch.tensor(cache.layers[0].keys.shape[1])
    ids = golden_ids(0, 100)
    results["greedy"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    return results


def gradients(model):
    """Whole gradients of a loss, put together from those of all processes."""
    ids = golden_ids(0, 24)
    model(ids, labels=ids).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[f"grad.{name}"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main(folder, result):
    """Load this process's part of the model and, as the first process, save what it computed."""
    with warnings.catch_warnings():
        # Transformers says that `tp_plan` is to go into a DistributedConfig; both must work.
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    results = measure(model) | gradients(model)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in results.items()}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
