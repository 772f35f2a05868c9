"""What holds for every test: one torch thread, since two on tensors this small only wait for each other; and fewer
examples of each property than hypothesis would take by itself, so that the suite keeps its six minutes."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("suite", max_examples=40, deadline=None)
settings.load_profile("suite")
