"""Devices and hosts: the mesh and its shardings (sharding.py), and processes that form one run (distributed.py)."""
