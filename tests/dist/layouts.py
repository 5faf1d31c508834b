"""What tests of ranks share: the layouts, and the size of the tiny model that each is tried on.

The model itself, with and without tied embeddings, is the fixture ``tiny``.
"""

import numpy as np

SEED = int(np.random.SeedSequence().entropy % 2**31)  # fresh inputs; printed with a failure
VOCAB = 128
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    ),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
                       "sequence_parallel": True}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
    "tp2_ep2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                    "expert_model_parallel_size": 2}),
    "tp2_ep2_dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                        "expert_model_parallel_size": 2}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
}
"""By name (ranks, fields of ``ParallelConfig``)."""

SPLIT = ("tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2", "tp2_pp2")
"""Each way of splitting the work, and two of them at once: what equals one process equals all."""
