"""What decodes faster, each proven equal to the plain path: rows times matrices, and steps that are recorded."""
