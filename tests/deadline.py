"""The deadline of whatever a test waits for: it is reached only where something hangs, also on a slow machine."""

DEADLINE_S = 300
