"""Devices and processes: pmap, meshes, hosts, preemption."""
