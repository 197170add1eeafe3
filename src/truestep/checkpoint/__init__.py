"""Checkpoints: old or new, never neither.

`commit` is the protocol, `state` what is saved, `tensors` the format. Only the last two import
torch; the modules are imported by their own names.
"""
