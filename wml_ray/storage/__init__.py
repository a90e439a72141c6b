"""Files of runs and studies: paths, retries, and one writer a folder."""
