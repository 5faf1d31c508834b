# NVIDIA's PyTorch image carries the parts that PyPI does not: a matching CUDA build of torch,
# Transformer Engine, NVIDIA's Apex and flash-attn. They are kept as the image has them.
ARG BASE=nvcr.io/nvidia/pytorch:26.04-py3
FROM ${BASE}

WORKDIR /opt/megatron_irl
COPY setup.py README.md pyproject.toml ./
COPY megatron_irl ./megatron_irl
COPY tools ./tools
COPY examples ./examples

# --no-build-isolation and no constraints file: the constraints pin CPU machines' torch. The image's
# own torch, transformer-engine and flash-attn already satisfy setup.py and must not be replaced.
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/keep.txt \
 && pip install --no-cache-dir --no-build-isolation --constraint /tmp/keep.txt . \
 && python -c "import transformer_engine.pytorch, apex, megatron_irl.hardware"

ENTRYPOINT ["megatron-irl"]
