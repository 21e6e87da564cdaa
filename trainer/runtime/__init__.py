"""The process and its machine: ranks, devices, memory, random draws, progress."""
