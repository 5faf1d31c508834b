"""What a recipe takes on which machine, before it runs: memory, operations, time, layouts.

Parameters and activations come from Megatron's own modules, built and run on fake tensors in fake
process groups; time is a roofline with factors that were fitted to measurements on an H100.
"""
