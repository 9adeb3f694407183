"""One thread per test process: pytest runs as many processes as there are cores."""

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# The processes that tests start are forked from one that has imported these already.
multiprocessing.set_forkserver_preload(["negative_cache.workbench.training", "torch.distributed.fsdp"])
