"""Patches of upstream packages: one file each, with its reason, the version, and when it goes."""
