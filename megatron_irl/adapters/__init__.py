"""LoRA: low-rank updates of frozen linear layers, sharded as Megatron shards the layers."""
