"""Processes and the backends that make them one."""
