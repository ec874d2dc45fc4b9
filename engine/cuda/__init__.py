"""What the paged engine runs on an NVIDIA GPU; imports without one."""
