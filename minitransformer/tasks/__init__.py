"""Tasks run in parallel processes, with results on disk: the base of sweeps and the laboratory."""
