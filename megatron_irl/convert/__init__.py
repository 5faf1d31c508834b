"""Hugging Face folders ↔ Megatron parameters: one table, read slice by slice, written streamed."""
