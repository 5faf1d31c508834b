"""Where samples have the same last bits in any company."""

import torch

# MKL's products for AVX2 depend on the number of rows.
EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"
