"""Settings of all tests."""

import torch

torch.set_num_threads(1)  # the results of a sum depend on how many threads share it
