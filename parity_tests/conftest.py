"""The parity tests' own settings."""

import torch

# The test runner starts one process a core; torch's own threads would only compete with them.
torch.set_num_threads(1)
