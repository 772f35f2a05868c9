"""What holds for every test: one torch thread, since two on tensors this small only wait for each other."""

import torch

torch.set_num_threads(1)
