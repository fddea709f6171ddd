"""Small networks are fastest on one thread, and tests run beside one another."""
import train        # noqa: F401    before torch: it asks for reproducible products

import torch

torch.set_num_threads(1)
