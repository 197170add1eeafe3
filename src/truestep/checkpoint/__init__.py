"""Checkpoints: old or new, never neither.

`commit` is the protocol and `lock` keeps other processes out; `snapshot` is what is saved, `state`
saves and loads it, `writer` saves it in the background, `bundle` saves it with a batch, `tensors`
is the format. Modules are imported by their own names; `commit` and `lock` do without torch.
"""
