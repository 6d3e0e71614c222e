"""The step executor: untrusted code in a locked process tree of its own (never in ours)."""
