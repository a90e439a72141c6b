"""The settings of a run: their schema, and how they are read from YAML files and overrides."""
