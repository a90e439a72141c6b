"""Networks out of a finished run: one peer or an ensemble as a module that takes images as they are."""
