"""The settings of a run: schema and loading."""
