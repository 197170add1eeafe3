"""Text to token ids to batches: all of it a pure function of files, settings and the step.

Only `loader` imports torch; the modules are imported by their own names, so that preparing does
not wait for it.
"""
