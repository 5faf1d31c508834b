"""``megatron-irl benchmark``: the speed of a recipe's phases on this machine, beside a peer's."""
