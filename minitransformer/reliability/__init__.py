"""What proves, on the user's own machine and disk, that a run cannot be lost."""
