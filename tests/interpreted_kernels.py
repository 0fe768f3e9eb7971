"""Imported before anything that imports Triton, which looks at it then: without a GPU its kernels
are interpreted, on a CPU.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
