"""Benchmarks against peers and the limits of the machine.

torch is imported only in the contestants' processes, so that help and errors are immediate.
"""
