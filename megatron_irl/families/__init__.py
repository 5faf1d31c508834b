"""Model families: one file each, and the line in ``registry`` that makes it known.

A family's file says how its ``config.json`` reads in Megatron's terms (an ``Architecture``), which
HF tensors make which Megatron parameters (its rows), and what of it is refused. What several
families share is in ``llama_like``, ``moe_like``, ``gemma_like``, ``rope`` and ``windows``; how the
model is then built follows from the ``Architecture`` alone. Nothing here needs Megatron.

To add one: write the file, add it to ``registry.FAMILIES``, and give ``tests/convert`` a tiny
model of it.
"""
