"""What is checked before a run starts: one class for each question, which train.py would answer later or too late."""

from minitransformer.preflight import data_checks, disk_checks, machine_checks, memory_checks, time_checks
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck, findings_of

__all__ = [
    "Candidate",
    "Finding",
    "PreflightCheck",
    "data_checks",
    "disk_checks",
    "findings_of",
    "machine_checks",
    "memory_checks",
    "time_checks",
]
