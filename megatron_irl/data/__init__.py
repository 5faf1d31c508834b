"""From files to microbatches: tokens, demonstrations, order, packing, and the pair bank.

Everything here is numpy and files: no process group, no megatron import. What must happen on one
rank only (writing) is the caller's to arrange.
"""
