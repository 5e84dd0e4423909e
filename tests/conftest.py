"""Settings of all tests."""

import os
import tempfile

import torch

torch.set_num_threads(1)  # the results of a sum depend on how many threads share it
# The cache of torch's compiler, for the processes that tests start as well: it is not in the
# temporary folders in which they look for what a command has left behind.
CACHE = os.path.join(tempfile.gettempdir(), "torchinductor")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE)
