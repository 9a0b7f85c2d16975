import torch

# The models here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)
