"""Tasks measured in processes, with results that outlive them: what a sweep and the laboratory run on."""
