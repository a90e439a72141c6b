"""Tables and pictures of runs and studies."""
