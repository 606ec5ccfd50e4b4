"""Before any kernel is imported: without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os

# Threads that wait for work sleep instead of spinning: beside other processes, spinning makes tests
# of tiny models many times slower. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # after the setting above
from hypothesis import settings

# How long an example takes says something about the machine, not about the code. The examples are
# the same in every run, so that a failure says something about the change; AMBIDEX_RANDOM_TESTS=1
# draws new ones.
SAME_EXAMPLES = "AMBIDEX_RANDOM_TESTS" not in os.environ
settings.register_profile("ambidex", deadline=None, derandomize=SAME_EXAMPLES)
settings.load_profile("ambidex")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
