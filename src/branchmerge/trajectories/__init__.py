"""Teacher trajectories: read them (sources), check them (schema, verification), choose among them (selection)."""
